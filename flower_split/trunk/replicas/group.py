"""The process group that carries tensors between the trunk's leader and its followers.

It is ``torch.distributed``'s: NCCL between GPUs, gloo on CPUs, bound to loopback. The processes find each
other through a file in a directory that only their user can read, so no port is open to others.

The groups are made directly, not with ``init_process_group``: that makes one for the whole process,
which may belong to whoever runs a trunk inside a program of theirs.
"""

from datetime import timedelta
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from flower_split.errors import ConfigError

LEADER = 0  # its rank
_STORE = "replicas"  # the file's name
_TAG = 0


class _Work(Protocol):
    """A message on its way."""

    def wait(self) -> object:
        """Wait for it; on a GPU the current stream does."""


class _Group(Protocol):
    """What torch's stubs leave out of a back end."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> _Work:
        """Begin to send a tensor."""

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> _Work:
        """Begin to receive a tensor."""

    def abort(self) -> None:
        """Give up all messages."""


class ReplicaGroup:
    """One process's end: rank 0 leads, the others follow. One thread at a time calls it.

    All processes make theirs at the same time; whoever waits longer than ``timeout`` seconds for the
    others, or for a message's other end, gets torch's error.

    Args:
        folder: Where the processes find each other; a directory of their own, readable by their user.
        rank: This process's.
        size: Processes.
        device: Of this process's tensors.
        timeout: Seconds.

    Raises:
        ConfigError: This build of torch has no back end for the device.
    """

    def __init__(
        self, folder: Path, rank: int, size: int, device: torch.device, timeout: float
    ) -> None:
        self.device = device
        limit = timedelta(seconds=timeout)
        store = dist.FileStore(str(folder / _STORE), size)  # type: ignore[attr-defined]  # not in the stubs
        store.set_timeout(limit)
        if device.type == "cuda":
            if not dist.is_nccl_available():
                raise ConfigError(
                    f"trunk.replicas on {device}: this build of torch has no NCCL, which carries tensors "
                    "between GPUs. Install one that has, or set trunk.replicas = 1."
                )
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = limit
            made: object = dist.ProcessGroupNCCL(store, rank, size, nccl)
        else:
            if not dist.is_gloo_available():
                raise ConfigError(
                    "trunk.replicas on CPUs: this build of torch has no gloo, which carries tensors "
                    "between processes. Install one that has, or set trunk.replicas = 1."
                )
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            gloo._timeout = limit
            made = dist.ProcessGroupGloo(store, rank, size, gloo)
        self._group = cast(_Group, made)

    def abort(self) -> None:
        """Give up whatever waits in it, from any thread.

        A kernel of NCCL's whose peer is gone waits for ever; gloo says so by itself.
        """
        if self.device.type == "cuda":
            self._group.abort()

    def send(self, buffer: Tensor, to: int) -> None:
        """Send bytes to a rank, which receives as many; on GPUs in the order of the current stream."""
        if buffer.numel():
            self._group.send([buffer], to, _TAG).wait()

    def receive(self, num_bytes: int, of: int) -> Tensor:
        """Return the bytes that a rank sends, ``[num_bytes]`` of uint8 on this process's device."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        if num_bytes:
            self._group.recv([buffer], of, _TAG).wait()
        return buffer
