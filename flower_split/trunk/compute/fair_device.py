"""One device for the engines of several experiments: one computes at a time, and nobody starves.

Whose turn is next is whose calls have computed least (start-time fair queueing): every share has a
clock of the seconds that it has computed, and the lowest clock goes first. Who comes back from a pause
does not catch up what it did not use: its clock begins where the others' are.

Turns are also what makes the engines' numbers their own: torch's random state, by which dropout is
drawn, is one for the process.

Goyal, Vin, Chen: "Start-time Fair Queuing", SIGCOMM 1996.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class DeviceShare:
    """One experiment's share of a device. Its turns are taken by one thread.

    Args:
        device: The device that is shared.
    """

    def __init__(self, device: "FairDevice") -> None:
        self._device = device
        self.used = 0.0  # seconds, of its own turns
        # The device's lock guards these:
        self.clock = 0.0  # its place in the queue
        self.expected = 0  # turns that it will ask for as soon as its thread is free
        self.ready = threading.Semaphore(0)  # released by whose turn ends

    def expect(self) -> None:
        """Note something that waits for this share's thread, and then for a turn."""
        self._device.expect(self)

    def leave(self) -> None:
        """Note that nothing more comes: the thread has ended."""
        self._device.leave(self)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and have it inside the block.

        The wait ends when the others' calls have: whoever asked for what runs inside has a deadline.
        """
        self._device.take(self)
        try:
            yield
        finally:
            self._device.give(self)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let the others compute inside the block, within a turn: for what waits for a disk."""
        self._device.give(self, comes_back=False)
        try:
            yield
        finally:
            self._device.take(self, counts=False)


class FairDevice:
    """Gives turns. Thread-safe: a lock of its own, under which nothing else is locked.

    Args:
        clock: Monotonic seconds; tests pass their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._holder: DeviceShare | None = None
        self._reserved = False  # for the holder, whose thread is on its way to its next turn
        self._began = 0.0
        self._now = 0.0  # the place in the queue of the latest turn
        self._waiting: list[DeviceShare] = []  # in the order in which they came

    def share(self) -> DeviceShare:
        """Return the share of a new experiment."""
        return DeviceShare(self)

    @property
    def num_waiting(self) -> int:
        """Return how many wait for a turn now."""
        return len(self._waiting)

    def expect(self, share: DeviceShare) -> None:
        """See :meth:`DeviceShare.expect`."""
        with self._lock:
            share.expected += 1

    def leave(self, share: DeviceShare) -> None:
        """See :meth:`DeviceShare.leave`."""
        with self._lock:
            share.expected = 0
            if self._holder is share and self._reserved:
                self._hand_on(None)

    def take(self, share: DeviceShare, *, counts: bool = True) -> None:
        """Wait until it is the turn of ``share``.

        Args:
            share: The share of the thread that asks.
            counts: Whether it was expected.
        """
        with self._lock:
            if counts:
                share.expected = max(0, share.expected - 1)
            share.clock = max(share.clock, self._now)
            if self._holder is None or (self._holder is share and self._reserved):
                self._begin(share)
                return
            self._waiting.append(share)
        share.ready.acquire()  # whose turn ends has begun this one

    def give(self, share: DeviceShare, *, comes_back: bool = True) -> None:
        """End the turn of ``share``, and begin the next one.

        Args:
            share: Who has the turn.
            comes_back: Whether it may have the next one, too.
        """
        with self._lock:
            seconds = self._clock() - self._began
            share.used += seconds
            share.clock += seconds
            self._hand_on(share if comes_back and share.expected else None)

    def _hand_on(self, former: DeviceShare | None) -> None:
        """Begin the turn of whose clock is lowest, or reserve it for ``former``, whose thread comes."""
        following = min(self._waiting, key=lambda item: item.clock, default=None)
        if former is not None and (following is None or former.clock < following.clock):
            self._holder, self._reserved = former, True
            return
        self._holder, self._reserved = None, False
        if following is not None:
            self._waiting.remove(following)
            self._begin(following)
            following.ready.release()

    def _begin(self, share: DeviceShare) -> None:
        self._holder, self._reserved = share, False
        self._now = max(self._now, share.clock)
        self._began = self._clock()
