"""Between a GPU and the wire: pinned buffers, and a side stream for the way out.

On the CPU nothing here copies or allocates.
"""

import functools

import torch
from torch import Tensor

from flower_split.wire.buffers import Allocate, pinned, pooled


def allocator(device: torch.device) -> Allocate:
    """Where payloads that end up on ``device`` are received."""
    return pinned if device.type == "cuda" else pooled


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def to_host(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU: itself, or a pinned copy that is complete on return.

    The copy runs on a side stream behind what computes ``tensor``, so that the kernels which other
    micro-batches launch meanwhile do not wait for it. The caller must have ``tensor``'s stream as
    the current one.
    """
    if tensor.device.type != "cuda":
        return tensor.detach().cpu()
    source = tensor.detach().contiguous()
    stream = _side_stream(source.device)
    stream.wait_stream(torch.cuda.current_stream(source.device))
    with torch.cuda.stream(stream):
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        host.copy_(source, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        copied.record(stream)
    source.record_stream(stream)
    copied.synchronize()
    return host


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``, ready for the current stream; does not block where ``host`` is pinned.

    The copy runs on the current stream: whatever uses the result waits for it in any case, and
    memory made on a side stream would need its lifetime tracked across streams.
    """
    if device.type == "cpu":
        return host
    return host.to(device, non_blocking=host.is_pinned())
