"""Tensors from the bytes of a safetensors file: what is wrong with it is a ValueError, whatever it is."""

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor


def tensors_from(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, sorted by name.

    Raises:
        ValueError: It is none, or has a dtype or a shape that torch does not have.
    """
    try:
        return dict(sorted(load(content).items()))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    except KeyError as error:  # its table of dtypes has not all that the format has
        raise ValueError(f"torch has no dtype {error}") from error
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"a shape does not fit its bytes ({error})") from error
