"""Where received payloads are put: pooled memory, or pinned memory next to a GPU.

Fresh memory of tens of megabytes costs a page fault per 4 KiB, more than the copy into it; a pool
that gets its buffers back when the last tensor over them dies avoids that, and needs no release
calls. Pinned memory comes from torch's own caching allocator.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Allocate = Callable[[int], Tensor]
"""``allocate(num_bytes)`` gives an uninitialised, writable uint8 tensor [num_bytes] on the CPU."""

SMALL = 1 << 18  # bytes; below this malloc's own reuse is as good


def pinned(num_bytes: int) -> Tensor:
    """Page-locked memory, which a GPU copies to and from without blocking the CPU."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class BufferPool:
    """Reusable receive buffers, aligned as torch aligns its tensors. Thread-safe.

    A buffer is taken by :meth:`allocate` and comes back by itself when nothing refers to the
    tensor's memory any more.

    Args:
        max_bytes: Limit on the memory of buffers that are not in use; the rest is freed.
    """

    def __init__(self, max_bytes: int = 1 << 28) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._free: list[Tensor] = []
        # Finalizers run anywhere, even while this thread holds the lock: they only append here.
        self._returned: deque[Tensor] = deque()

    def allocate(self, num_bytes: int) -> Tensor:
        """An uninitialised uint8 tensor [num_bytes]."""
        if num_bytes < SMALL:
            return torch.empty(num_bytes, dtype=torch.uint8)
        with self._lock:
            buffer = self._take(num_bytes)
        if buffer is None:
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
        # The array is the one owner of the buffer that torch keeps: its end is the tensor's end.
        array = np.frombuffer(buffer.numpy().data, dtype=np.uint8, count=num_bytes)
        weakref.finalize(array, self._returned.append, buffer).atexit = False
        return torch.from_numpy(array)

    def free_bytes(self) -> int:
        """Memory held for reuse."""
        with self._lock:
            self._collect()
            return sum(b.nbytes for b in self._free)

    def _collect(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
        held = sum(b.nbytes for b in self._free)
        while held > self._max_bytes:
            held -= self._free.pop(0).nbytes

    def _take(self, num_bytes: int) -> Tensor | None:
        """The smallest free buffer that fits without wasting more than half of it."""
        self._collect()
        fitting = [b for b in self._free if num_bytes <= b.nbytes <= 2 * num_bytes]
        if not fitting:
            return None
        best = min(fitting, key=lambda b: b.nbytes)
        self._free = [b for b in self._free if b is not best]
        return best


_POOL = BufferPool()


def pooled(num_bytes: int) -> Tensor:
    """Memory from the process's one pool."""
    return _POOL.allocate(num_bytes)
