"""What this process holds in memory now."""

import os
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Return the process's resident memory; 0 where the system does not tell."""
    try:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def accelerator_bytes() -> int:
    """Return what torch has allocated on this process's GPUs; 0 without one."""
    return sum(torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count()))
