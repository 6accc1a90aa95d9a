"""Which content lies where in memory that two processes share, without a lock between them.

A sender puts the payloads of a message into a *slot*; the receiver works on them where they lie. Each
entry of the tables has one writer:

- ``generations[slot]``, the sender's: which content the slot has.
- ``seen[slot]``, the receiver's: the last generation that it has opened.
- ``uses[...]``, the receiver's: ``slot + 1`` for every use that the slot is still in.

A slot is written again only when its message has been answered, its generation was seen, and no use is
left. The receiver enters its uses first and compares generations then; the sender raises the generation
first and looks at the uses then. So of a late repetition and a new content, one gives way.
"""

import mmap
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flower_split.errors import CodecError

_ALIGNMENT = 64  # of every payload, in bytes
_PAGE = 4096


def aligned(num_bytes: int) -> int:
    """Return the distance from a payload of so many bytes to the next one."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class Place:
    """Where a message's payloads lie, in the sender's half."""

    slot: int
    generation: int
    offset: int


@dataclass(frozen=True, slots=True)
class TableSize:
    """How many slots and uses the tables of one direction have."""

    slots: int
    uses: int

    @property
    def num_bytes(self) -> int:
        """Of the three tables."""
        return 8 * self.slots + 2 * self.uses


@dataclass(slots=True)
class _Slot:
    offset: int
    num_bytes: int
    held: bool = True  # its message may still be sent again


class SlotTable:
    """The slots of one direction; a process uses them as sender or as receiver.

    Args:
        memory: Shared; holds the tables, whatever memory holds the payloads.
        begin: Where the tables begin, in bytes.
        size: Size of the tables, in bytes.
        num_bytes: Most that the payloads may take.
    """

    def __init__(self, memory: mmap.mmap, begin: int, size: TableSize, num_bytes: int) -> None:
        self._size, self._num_bytes = size, num_bytes
        slots, uses = size.slots, size.uses
        self._generations: NDArray[np.uint32] = np.frombuffer(memory, np.uint32, slots, begin)
        self._seen: NDArray[np.uint32] = np.frombuffer(memory, np.uint32, slots, begin + 4 * slots)
        self._uses: NDArray[np.uint16] = np.frombuffer(memory, np.uint16, uses, begin + 8 * slots)
        self._lock = threading.Lock()
        self._slots: list[_Slot] = []  # the sender's
        self._used = 0  # bytes that slots have been made of

    # ------------------------------------------------------------------ the sender

    def take(self, wanted: int) -> Place | None:
        """Return a place for so many bytes, its generation raised; None: there is no room."""
        with self._lock:
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
                    return self._place(index)
            if len(self._slots) == self._size.slots or self._used + wanted > self._num_bytes:
                return None
            self._slots.append(_Slot(self._used, wanted))
            self._used += wanted
            index = len(self._slots) - 1
            self._generations[index] += 1
            return self._place(index)

    def answered(self, place: Place) -> None:
        """Note that the message will not be sent again: its slot is free once nobody uses it."""
        self._slots[place.slot].held = False

    def _place(self, index: int) -> Place:
        return Place(index, int(self._generations[index]), self._slots[index].offset)

    # ------------------------------------------------------------------ the receiver

    def enter(self, place: Place, wanted: int, count: int) -> list[int]:
        """Enter ``count`` uses of a slot and return them, each for one :meth:`leave`.

        Args:
            place: As the message says; not trusted.
            wanted: Bytes that lie there.
            count: Number of the uses.

        Raises:
            CodecError: It is no place in this half, or its content has been replaced.
        """
        if not (0 <= place.slot < self._size.slots and place.offset + wanted <= self._num_bytes):
            raise CodecError(
                f"a message's payloads must lie within the {self._num_bytes} bytes of shared memory "
                f"and {self._size.slots} slots; this one names slot {place.slot}, offset "
                f"{place.offset} and {wanted} bytes."
            )
        with self._lock:
            entries: list[int] = np.flatnonzero(self._uses == 0)[:count].tolist()
            if len(entries) < count:
                raise CodecError(
                    f"more than {self._size.uses} tensors are in use in shared memory."
                )
            self._uses[entries] = place.slot + 1
            if self._generations[place.slot] != place.generation:
                self._uses[entries] = 0
                raise CodecError(
                    f"the content of slot {place.slot} has been replaced: this message is a late "
                    "repetition of one that was answered."
                )
            self._seen[place.slot] = place.generation
        return entries

    def leave(self, entry: int) -> None:
        """End a use: one store of 0, so that a finalizer may do it anywhere and on any thread."""
        self._uses[entry] = 0
