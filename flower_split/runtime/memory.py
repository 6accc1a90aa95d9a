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


def accelerator_bytes() -> tuple[int, int]:
    """Return what torch has allocated on this process's GPUs, now and at most; zeros without one."""
    devices = range(torch.cuda.device_count())
    now = sum(torch.cuda.memory_allocated(index) for index in devices)
    return now, sum(torch.cuda.max_memory_allocated(index) for index in devices)
