"""Which device a part of the run computes on."""

import torch

from flower_split.errors import ConfigError


def pick_device(key: str, name: str) -> torch.device:
    """The device that a run-config key names; "auto" is CUDA where there is one.

    Args:
        key: The run-config key, for the error.
        name: "auto", "cpu", "cuda", "cuda:1", ...

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f'{key} must name a device of this machine; "{name}" gives: '
            f'{str(error).splitlines()[0]} Use "auto" or "cpu".'
        ) from error
    return device
