"""Memory at the wire's ends: receive buffers, and the copies between a GPU and the wire.

Fresh memory of tens of megabytes costs a page fault per 4 KiB, more than the copy into it; a pool
that gets its buffers back when the last tensor over them dies avoids that, and needs no release
calls. Next to a GPU memory is pinned, from torch's own caching allocator, and what leaves the GPU
goes by a side stream. On the CPU nothing is copied.
"""

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Allocate = Callable[[int], Tensor]
"""``allocate(num_bytes)`` returns an uninitialised, writable uint8 tensor [num_bytes] on the CPU."""

SMALL = 1 << 18  # bytes; below this malloc's own reuse is as good


def pinned(num_bytes: int) -> Tensor:
    """Return page-locked memory, which a GPU copies to and from without blocking the CPU."""
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
        """Return an uninitialised uint8 tensor [num_bytes]."""
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
        """Return the memory held for reuse, in bytes."""
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
        """Return the smallest free buffer that fits without wasting more than half of it."""
        self._collect()
        fitting = [b for b in self._free if num_bytes <= b.nbytes <= 2 * num_bytes]
        if not fitting:
            return None
        best = min(fitting, key=lambda b: b.nbytes)
        self._free = [b for b in self._free if b is not best]
        return best


_POOL = BufferPool()


def pooled(num_bytes: int) -> Tensor:
    """Return memory from the process's one pool, an uninitialised uint8 tensor [num_bytes]."""
    return _POOL.allocate(num_bytes)


def allocator(device: torch.device) -> Allocate:
    """Return what allocates the memory for payloads that end up on ``device``."""
    return pinned if device.type == "cuda" else pooled


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a GPU on which this process copies."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def to_host(tensor: Tensor) -> Tensor:
    """Return ``tensor`` on the CPU; see :func:`tensors_to_host`."""
    return tensors_to_host({"": tensor})[""]


def tensors_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor on the CPU: itself, or a pinned copy that is complete on return; one wait.

    The copies run on a side stream behind what computes them, so that the kernels which other
    micro-batches launch meanwhile do not wait for them. The caller must have the tensors' stream as
    the current one.
    """
    found: dict[str, Tensor] = {}
    copied: dict[torch.device, torch.cuda.Event] = {}
    for name, tensor in tensors.items():
        if tensor.device.type != "cuda":
            found[name] = tensor.detach().cpu()
            continue
        source = tensor.detach().contiguous()
        stream = side_stream(source.device)
        stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream):
            found[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            found[name].copy_(source, non_blocking=True)
            copied[source.device] = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied[source.device].record(stream)
        source.record_stream(stream)
    for event in copied.values():
        event.synchronize()
    return found


def aside(device: torch.device) -> AbstractContextManager[object]:
    """Let this thread copy and check beside what other threads compute on a GPU.

    A GPU's work waits for all that its stream was given before; inside the block this thread has
    another stream, and waits for nobody. What it reads must be complete.
    """
    return torch.cuda.stream(side_stream(device))


def arrived(host: Tensor, device: torch.device) -> Tensor:
    """Return a tensor that has arrived, on the GPU and complete, whatever stream uses it next.

    Called inside :func:`aside`.
    """
    tensor = host.to(device, non_blocking=host.is_pinned())
    tensor.record_stream(torch.cuda.default_stream(device))
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(device))
    copied.synchronize()
    return tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return ``host`` on ``device``, ready for the current stream; pinned memory does not block.

    The copy runs on the current stream: whatever uses the result waits for it in any case, and
    memory made on a side stream would need its lifetime tracked across streams.
    """
    if device.type == "cpu":
        return host
    return host.to(device, non_blocking=host.is_pinned())


class ToHost(torch.autograd.Function):
    """Smashed data to the CPU; its gradient to the device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Return ``tensor`` on the CPU."""
        ctx.device = tensor.device
        return to_host(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return its gradient on the device."""
        return to_device(gradient, ctx.device)


class ToDevice(torch.autograd.Function):
    """trunk_output to the device; its gradient to the CPU."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        """Return ``tensor`` on ``device``."""
        return to_device(tensor, device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return its gradient on the CPU."""
        return to_host(gradient), None
