"""One device for the engines of several experiments: one computes at a time, and nobody starves.

Whose turn is next is whose calls have computed least (start-time fair queueing): every share has a
clock of the seconds that it has computed, and the lowest clock goes first. Who comes back from a pause
does not catch up what it did not use: its clock begins where the others' are.

Turns are also what makes the engines' numbers their own: torch's random state, by which dropout is
drawn, is one for the process.

Goyal, Vin, Chen: "Start-time Fair Queuing", SIGCOMM 1996.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flower_split.errors import TrunkUnavailable

logger = logging.getLogger(__name__)

_FIRST_LINE = 10.0  # seconds of waiting until the log says so; then whenever they have doubled


class DeviceShare:
    """One experiment's share of a device. Its turns are taken by one thread.

    Args:
        device: The device that is shared.

    Attributes:
        name: The name of its experiment, for messages.
    """

    def __init__(self, device: "FairDevice") -> None:
        self._device = device
        self.name = "one that has begun no round"
        self.used = 0.0  # seconds, of its own turns
        # The device's lock guards these:
        self.clock = 0.0  # its place in the queue
        self.expected = 0  # turns that it will ask for as soon as its thread is free
        self.closed = False  # it begins no turn any more
        self.begins = False  # whether it waits to begin a turn, not to go on with one
        self.ready = threading.Semaphore(0)  # released by whose turn ends

    def expect(self) -> None:
        """Note something that waits for this share's thread, and then for a turn."""
        self._device.expect(self)

    def leave(self) -> None:
        """Note that nothing more comes: the thread has ended."""
        self._device.leave(self)

    def close(self) -> None:
        """End the wait for a turn that has not begun, now and later."""
        self._device.close(self)

    @contextmanager
    def turn(self, seconds: float | None = None) -> Iterator[None]:
        """Wait for a turn, and have it inside the block.

        Args:
            seconds: The seconds until the wait is given up. None: until :meth:`close`; for an experiment's
                thread, whose callers have deadlines of their own, and whose work must not be dropped while
                its experiment goes on. The log says whom it waits for.

        Raises:
            TrunkUnavailable: It did not begin in time, or the share was closed.
        """
        self._device.take(self, seconds=seconds)
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
        first_line: The seconds of waiting until the log says so.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, first_line: float = _FIRST_LINE
    ) -> None:
        self._clock = clock
        self._first_line = first_line
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

    def close(self, share: DeviceShare) -> None:
        """See :meth:`DeviceShare.close`."""
        with self._lock:
            share.closed = True
            if share in self._waiting and share.begins:
                self._waiting.remove(share)
                share.ready.release()

    def take(
        self, share: DeviceShare, *, counts: bool = True, seconds: float | None = None
    ) -> None:
        """Wait until it is the turn of ``share``.

        Args:
            share: The share of the thread that asks.
            counts: Whether it begins a turn; else it goes on with one, which nothing ends.
            seconds: See :meth:`DeviceShare.turn`.

        Raises:
            TrunkUnavailable: See :meth:`DeviceShare.turn`.
        """
        with self._lock:
            if counts:
                share.expected = max(0, share.expected - 1)
                _require_open(share)
            share.clock = max(share.clock, self._now)
            if self._holder is None or (self._holder is share and self._reserved):
                self._begin(share)
                return
            share.begins = counts
            self._waiting.append(share)
        self._wait(share, seconds)
        if self._holder is not share:
            _require_open(share)  # it was closed, and has none

    def _wait(self, share: DeviceShare, seconds: float | None) -> None:
        """Wait until whose turn ends has begun the one of ``share``; tell the log of a long wait."""
        waited, next_line = 0.0, self._first_line
        while True:
            until = next_line if seconds is None else min(seconds, next_line)
            if share.ready.acquire(timeout=until - waited):
                return
            waited = until
            with self._lock:
                if share not in self._waiting:
                    continue  # its turn has begun just now
                why = self._why(share, waited)
                if seconds is not None and waited >= seconds:
                    self._waiting.remove(share)
                    raise TrunkUnavailable(f"{why}. Try again.")
            logger.warning("%s", why)
            next_line = 2 * waited

    def _why(self, share: DeviceShare, waited: float) -> str:
        holder = "nobody" if self._holder is None else f"experiment {self._holder.name}"
        return (
            f"experiment {share.name} has waited for {waited:.3g} s for its turn on the trunk's device: "
            f"{holder} has computed for {self._clock() - self._began:.3g} s, and {len(self._waiting) - 1} "
            "more wait"
        )

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


def _require_open(share: DeviceShare) -> None:
    """Check that a share may begin a turn.

    Raises:
        TrunkUnavailable: It was closed.
    """
    if share.closed:
        raise TrunkUnavailable(
            f"experiment {share.name} has ended before its turn on the trunk's device."
        )
