"""Memory that a trunk and a client of the same host and user map, for the payloads of their calls.

The file has no name (``memfd``): when both processes are gone, however they ended, so is it. The trunk
makes it and the client opens it through the trunk's process, which the kernel allows to the same user
alone. Each half belongs to one sender::

    nonce | of each half: generations, seen, uses | payloads of the client | payloads of the trunk

A sender puts the payloads of a message into a *slot*; the receiver works on them where they lie. Who
may touch what, without a lock between the processes, each entry having one writer:

- ``generations[slot]``, the sender's: which content the slot has.
- ``seen[slot]``, the receiver's: the last generation that it has opened.
- ``uses[...]``, the receiver's: ``slot + 1`` for every tensor that is still alive over the slot.

A slot is written again only when its message has been answered, its generation was seen, and no use is
left. The receiver enters its uses first and compares generations then; the sender raises the generation
first and looks at the uses then. So of a late repetition and a new content, one gives way.
"""

import fcntl
import mmap
import os
import secrets
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_split.errors import CodecError

_SLOTS = 256
_USES = 4096
_ALIGNMENT = 64  # of every payload, in bytes
_NONCE = 16  # bytes
_HALF_TABLES = 8 * _SLOTS + 2 * _USES  # bytes of the tables of one half
_PAGE = 4096
_TABLES = -(-(_ALIGNMENT + 2 * _HALF_TABLES) // _PAGE) * _PAGE  # nonce and tables, in whole pages
_NAME = "flower-split"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def aligned(num_bytes: int) -> int:
    """Return the distance from a payload of so many bytes to the next one."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class Place:
    """Where a message's payloads lie, in the sender's half."""

    slot: int
    generation: int
    offset: int


@dataclass(slots=True)
class _Slot:
    offset: int
    num_bytes: int
    held: bool = True  # its message may still be sent again


class _Half:
    """One direction of the memory; a process uses it as sender or as receiver."""

    def __init__(self, memory: mmap.mmap, tables: int, begin: int, num_bytes: int) -> None:
        self._memory = memory
        self._begin, self._num_bytes = begin, num_bytes
        self._generations: NDArray[np.uint32] = np.frombuffer(memory, np.uint32, _SLOTS, tables)
        self._seen: NDArray[np.uint32] = np.frombuffer(
            memory, np.uint32, _SLOTS, tables + 4 * _SLOTS
        )
        self._uses: NDArray[np.uint16] = np.frombuffer(
            memory, np.uint16, _USES, tables + 8 * _SLOTS
        )
        self._lock = threading.Lock()
        self._slots: list[_Slot] = []  # the sender's
        self._used = 0  # bytes that slots have been made of

    # ------------------------------------------------------------------ the sender

    def put(self, payloads: Sequence[memoryview]) -> Place | None:
        """Copy payloads in; None: there is no room, so they must travel otherwise."""
        wanted = sum(aligned(payload.nbytes) for payload in payloads)
        with self._lock:
            slot = self._take(wanted)
            if slot is None:
                return None
            generation = int(self._generations[slot])
        offset = at = self._slots[slot].offset
        for payload in payloads:  # numpy copies without the interpreter's lock
            target = np.frombuffer(self._memory, np.uint8, payload.nbytes, self._begin + at)
            target[:] = np.frombuffer(payload, np.uint8)
            at += aligned(payload.nbytes)
        return Place(slot, generation, offset)

    def answered(self, place: Place) -> None:
        """Note that the message will not be sent again: its slot is free once nobody uses it."""
        self._slots[place.slot].held = False

    def _take(self, wanted: int) -> int | None:
        """Return a slot with room, its generation raised. The lock is held."""
        in_use = set(np.unique(self._uses).tolist())
        fitting = [
            index
            for index, slot in enumerate(self._slots)
            if not slot.held
            and wanted <= slot.num_bytes <= max(2 * wanted, _PAGE)
            and self._seen[index] == self._generations[index]
            and index + 1 not in in_use
        ]
        for index in sorted(fitting, key=lambda index: self._slots[index].num_bytes):
            self._generations[index] += 1
            if index + 1 not in self._uses:  # a late repetition may have opened it meanwhile
                self._slots[index].held = True
                return index
        if len(self._slots) == _SLOTS or self._used + wanted > self._num_bytes:
            return None
        self._slots.append(_Slot(self._used, wanted))
        self._used += wanted
        index = len(self._slots) - 1
        self._generations[index] += 1
        return index

    # ------------------------------------------------------------------ the receiver

    def open(self, place: Place, sizes: Sequence[int]) -> list[Tensor]:
        """Return the payloads of a message as uint8 tensors over the shared memory.

        Args:
            place: As the message says; not trusted.
            sizes: Of the payloads, in bytes; they have been checked.

        Raises:
            CodecError: It is no place in this half, or its content has been replaced.
        """
        wanted = sum(aligned(size) for size in sizes)
        if not (0 <= place.slot < _SLOTS and place.offset + wanted <= self._num_bytes):
            raise CodecError(
                f"a message's payloads must lie within the {self._num_bytes} bytes of shared memory "
                f"and {_SLOTS} slots; this one names slot {place.slot}, offset {place.offset} and "
                f"{wanted} bytes."
            )
        with self._lock:
            entries = np.flatnonzero(self._uses == 0)[: len(sizes)].tolist()
            if len(entries) < len(sizes):
                raise CodecError(f"more than {_USES} tensors are in use in shared memory.")
            self._uses[entries] = place.slot + 1
            if self._generations[place.slot] != place.generation:
                self._uses[entries] = 0
                raise CodecError(
                    f"the content of slot {place.slot} has been replaced: this message is a late "
                    "repetition of one that was answered."
                )
            self._seen[place.slot] = place.generation
        return list(self._views(place.offset, sizes, entries))

    def _views(self, offset: int, sizes: Sequence[int], entries: Sequence[int]) -> Iterator[Tensor]:
        for size, entry in zip(sizes, entries, strict=True):
            # The array is the one owner of the memory that torch keeps: its end is the tensor's end.
            array = np.frombuffer(self._memory, np.uint8, size, self._begin + offset)
            # One store of 0, so that a finalizer may run anywhere and on any thread.
            weakref.finalize(array, self._uses.__setitem__, entry, 0).atexit = False
            yield torch.from_numpy(array)
            offset += aligned(size)


class SharedMemory:
    """The mapped memory, as one of its two processes sees it.

    Attributes:
        sending: The half that this process writes.
        receiving: The half that it reads.
        nonce: The first bytes.
        num_bytes: Of the file.
        descriptor: Of the open file; closed with :meth:`close_file`.
    """

    def __init__(self, descriptor: int, num_bytes: int, *, trunk: bool) -> None:
        self.descriptor, self.num_bytes = descriptor, num_bytes
        memory = mmap.mmap(descriptor, num_bytes)
        half = (num_bytes - _TABLES) // 2
        client_half = _Half(memory, _ALIGNMENT, _TABLES, half)
        trunk_half = _Half(memory, _ALIGNMENT + _HALF_TABLES, _TABLES + half, half)
        self.sending, self.receiving = (
            (trunk_half, client_half) if trunk else (client_half, trunk_half)
        )
        self.nonce = bytes(memory[:_NONCE])

    @classmethod
    def make(cls, payload_bytes: int) -> "SharedMemory":
        """Make the trunk's side of a new file; its pages take memory when they are first written.

        Args:
            payload_bytes: Of each half.

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

    def close_file(self) -> None:
        """Close the file of :meth:`make`. What is mapped ends with the last tensor over it."""
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
