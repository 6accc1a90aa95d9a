"""Memory that a trunk and a client of the same host and user map, for the payloads of their calls.

The file has no name (``memfd``): when both processes are gone, however they ended, so is it. The trunk
makes it and the client opens it through the trunk's process, which the kernel allows to the same user
alone. Each half belongs to one sender::

    nonce | tables of each half | tables of each half on a GPU | payloads: client's | trunk's

:mod:`flower_split.wire.shared_slots` says who may touch what. Where both processes compute on one GPU,
tensors do not leave it (:mod:`flower_split.wire.device_memory`); the tables of that lie here as well.
"""

import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from flower_split.wire.device_memory import DeviceBuffer, DeviceMemory
from flower_split.wire.shared_slots import Place, SlotTable, TableSize, aligned

_HOST = TableSize(slots=256, uses=4096)
_DEVICE = TableSize(slots=64, uses=256)
_BEGIN = 64  # of the tables, after the nonce
_NONCE = 16  # bytes
_PAGE = 4096
_DEVICE_TABLES = _BEGIN + 2 * _HOST.num_bytes
_TABLES = -(-(_DEVICE_TABLES + 2 * _DEVICE.num_bytes) // _PAGE) * _PAGE  # in whole pages
_NAME = "flower-split"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _Half:
    """One direction of the memory; a process uses it as sender or as receiver."""

    def __init__(self, memory: mmap.mmap, tables: int, begin: int, num_bytes: int) -> None:
        self._memory = memory
        self._begin = begin
        self._table = SlotTable(memory, tables, _HOST, num_bytes)

    def put(self, payloads: Sequence[memoryview]) -> Place | None:
        """Copy payloads in; None: there is no room, so they must travel otherwise."""
        place = self._table.take(sum(aligned(payload.nbytes) for payload in payloads))
        if place is None:
            return None
        at = place.offset
        for payload in payloads:  # numpy copies without the interpreter's lock
            target = np.frombuffer(self._memory, np.uint8, payload.nbytes, self._begin + at)
            target[:] = np.frombuffer(payload, np.uint8)
            at += aligned(payload.nbytes)
        return place

    def answered(self, place: Place) -> None:
        """Note that the message will not be sent again: its slot is free once nobody uses it."""
        self._table.answered(place)

    def open(self, place: Place, sizes: Sequence[int]) -> list[Tensor]:
        """Return the payloads of a message as uint8 tensors over the shared memory.

        Args:
            place: As the message says; not trusted.
            sizes: The payloads' sizes in bytes; they have been checked.

        Raises:
            CodecError: It is no place in this half, or its content has been replaced.
        """
        entries = self._table.enter(place, sum(aligned(size) for size in sizes), len(sizes))
        return list(self._views(place.offset, sizes, entries))

    def _views(self, offset: int, sizes: Sequence[int], entries: Sequence[int]) -> Iterator[Tensor]:
        for size, entry in zip(sizes, entries, strict=True):
            # The array is the one owner of the memory that torch keeps: its end is the tensor's end.
            array = np.frombuffer(self._memory, np.uint8, size, self._begin + offset)
            weakref.finalize(array, self._table.leave, entry).atexit = False
            yield torch.from_numpy(array)
            offset += aligned(size)


class SharedMemory:
    """The mapped memory, as one of its two processes sees it.

    Attributes:
        sending: The half that this process writes.
        receiving: The half that it reads.
        nonce: The first bytes.
        num_bytes: Size of the file.
        device: Memory of a GPU beside it; None: there is none.
        descriptor: The open file's descriptor; closed with :meth:`close_file`.
    """

    def __init__(self, descriptor: int, num_bytes: int, *, trunk: bool) -> None:
        self.descriptor, self.num_bytes = descriptor, num_bytes
        memory = mmap.mmap(descriptor, num_bytes)
        half = (num_bytes - _TABLES) // 2
        client_half = _Half(memory, _BEGIN, _TABLES, half)
        trunk_half = _Half(memory, _BEGIN + _HOST.num_bytes, _TABLES + half, half)
        self.sending, self.receiving = (
            (trunk_half, client_half) if trunk else (client_half, trunk_half)
        )
        self.nonce = bytes(memory[:_NONCE])
        self._memory, self._is_trunk = memory, trunk
        self.device: DeviceMemory | None = None

    @classmethod
    def make(cls, payload_bytes: int) -> "SharedMemory":
        """Make the trunk's side of a new file; its pages take memory when they are first written.

        Args:
            payload_bytes: Size of each half.

        Raises:
            OSError: The kernel has no such files, or no memory.
        """
        num_bytes = _TABLES + 2 * (payload_bytes // _PAGE * _PAGE)
        descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, num_bytes)
        os.write(descriptor, secrets.token_bytes(_NONCE))
        # Nobody can shrink it below the other process, which would end that one with SIGBUS.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return cls(descriptor, num_bytes, trunk=True)

    @classmethod
    def of_process(
        cls, process: int, descriptor: int, num_bytes: int, nonce: bytes
    ) -> "SharedMemory":
        """Open the client's side of a trunk's file.

        Raises:
            OSError: The process is not there, is another user's, or the file is not the one that
                was offered.
        """
        path = f"/proc/{process}/fd/{descriptor}"
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise OSError(f"{path} is not a trunk's shared memory")
        opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            right = os.fstat(opened).st_size == num_bytes > _TABLES
            right = right and fcntl.fcntl(opened, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            if not right or os.pread(opened, _NONCE, 0) != nonce:
                raise OSError(f"{path} is not the memory that the trunk offers")
            return cls(opened, num_bytes, trunk=False)
        finally:
            os.close(opened)

    def share_device(self, buffer: DeviceBuffer, device: torch.device) -> None:
        """Let tensors of ``device``, this process's, go through a buffer that both processes have."""
        half = buffer.num_bytes // 2
        tables = [
            SlotTable(self._memory, _DEVICE_TABLES + index * _DEVICE.num_bytes, _DEVICE, half)
            for index in range(2)
        ]
        self.device = DeviceMemory(buffer, tables, device, trunk=self._is_trunk)

    def close_device(self) -> None:
        """Let go of the memory of a GPU; a call that still needs it fails. Idempotent."""
        if self.device is not None:
            self.device.close()

    def close_file(self) -> None:
        """Close the file of :meth:`make`. What is mapped ends with the last tensor over it."""
        self.close_device()
        os.close(self.descriptor)


class SharedFrames(Iterator[bytes]):
    """The frames of a message whose payloads may lie in shared memory.

    Args:
        frames: As they come.
        memory: Where the payloads lie if the header says so.
    """

    def __init__(self, frames: Iterator[bytes], memory: SharedMemory) -> None:
        self._frames = frames
        self.memory = memory

    def __next__(self) -> bytes:
        """Return the next frame."""
        return next(self._frames)


def host_identity() -> tuple[str, int]:
    """Return what names this host's running kernel, and the user; an empty name where none is known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip(), os.getuid()
    except OSError:
        return "", -1
