"""Which device a run config means."""

import torch

from flower_split.errors import ConfigError


def resolve_device(name: str, key: str) -> torch.device:
    """Return the device that ``name`` means: "auto" is CUDA where there is one, else the CPU.

    Args:
        name: "auto", or a device as torch names it.
        key: The run-config key it comes from, for the error.

    Raises:
        ConfigError: torch does not know the name, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f'{key} must be "auto", "cpu", "cuda" or "cuda:N"; it is {name!r}.'
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{key} is {name!r}, and torch sees {torch.cuda.device_count()} CUDA devices here. Install "
            'a CUDA build of torch, or set it to "auto" or "cpu".'
        )
    return device
