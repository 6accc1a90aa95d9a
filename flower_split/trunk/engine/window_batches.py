"""Gathering of the clients' calls: micro-batch k of a window is one batch of all who take part.

Who belongs to a batch is known beforehand: everybody who takes part in the window, but those whose last
micro-batch was an earlier one (a forward says whether it is the last). A batch starts when all of its
calls are there, whatever the order in which they came; its backward when all have come whose forward was
in it. Who is dropped is waited for no more. Nothing else ends the wait: the window's deadline drops
whoever holds it up.

The module holds no tensors, threads or clock. The engine's lock is held around every method.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import BatchReport, CallResult
from flower_split.trunk.compute.joint_pass import JointPass
from flower_split.trunk.compute.window_sum import WindowSum
from flower_split.trunk.engine.ledger import CallName

if TYPE_CHECKING:  # contributions.py puts its calls here
    from flower_split.trunk.engine.contributions import Contribution


class Stage(Enum):
    """What a batch waits for."""

    FORWARDS = "forwards"
    COMPUTING_FORWARD = "its forward"
    BACKWARDS = "backwards"
    COMPUTING_BACKWARD = "its backward"
    DONE = "nothing"


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A call that waits for the others of its batch."""

    item: "Contribution"
    future: Future[CallResult]


@dataclass(slots=True, eq=False)
class Batch:
    """The micro-batches of one place in the open window."""

    micro_batch: int
    stage: Stage = Stage.FORWARDS
    calls: dict[int, Waiting] = field(default_factory=dict)  # slot -> its call of this stage
    members: set[int] = field(default_factory=set)  # whose forward was in it
    passes: list[JointPass] = field(default_factory=list)

    @property
    def gathers(self) -> bool:
        """Whether it waits for calls."""
        return self.stage in (Stage.FORWARDS, Stage.BACKWARDS)

    def take(self) -> list[Waiting]:
        """Return the calls in slot order, which are computed now."""
        forward = self.stage is Stage.FORWARDS
        self.stage = Stage.COMPUTING_FORWARD if forward else Stage.COMPUTING_BACKWARD
        taken = [self.calls[slot] for slot in sorted(self.calls)]
        self.calls = {}
        return taken


Start = Callable[[Batch, list[Waiting]], None]


class WindowBatches:
    """The batches of the open window of one round.

    Args:
        start: Asks the compute thread for a batch's forward or backward, without waiting.
        total: The window's gradient.
    """

    def __init__(self, start: Start, total: WindowSum) -> None:
        self.total = total
        self._start = start
        self._batches: dict[int, Batch] = {}
        self._last: dict[int, int] = {}  # slot -> its last micro-batch in the open window
        self._num_batches = self._num_passes = self._num_partial = 0

    def report(self) -> BatchReport:
        """Return the round's figures so far."""
        return BatchReport(
            batches=self._num_batches,
            passes=self._num_passes,
            partial=self._num_partial,
            sums_again=self.total.times_again,
        )

    def check_forward(self, name: CallName, last: bool) -> None:
        """Check that a forward belongs to a batch that has not been computed.

        Raises:
            TrunkRefused: Its slot has named an earlier micro-batch as its last, or has sent a later
                one; or the batch has gone on without it (INVALID_REQUEST).
        """
        slot, index = name.slot, name.micro_batch
        end = self._last.get(slot)
        sent = [
            k for k, batch in self._batches.items() if slot in batch.calls.keys() | batch.members
        ]
        if (end is not None and index > end) or (last and index < max(sent, default=0)):
            raise _invalid(
                f"slot {slot} sends micro-batch {index}{' as its last' if last else ''} in window "
                f"{name.window}, where its last one is {max(sent) if end is None else end}."
            )
        batch = self._batches.get(index)
        if batch is not None and batch.stage is not Stage.FORWARDS:
            raise _invalid(
                f"batch {index} of window {name.window} has been computed, and the forward of slot "
                f"{slot} in it was refused."
            )

    def check_backward(self, name: CallName, last: bool) -> JointPass:
        """Return the pass that a backward belongs to.

        Raises:
            TrunkRefused: There is none that waits for it (UNKNOWN_CONTRIBUTION), or it says otherwise
                than its forward whether it is the slot's last (INVALID_REQUEST).
        """
        batch = self._batches.get(name.micro_batch)
        if batch is None or batch.stage is not Stage.BACKWARDS or name.slot not in batch.members:
            raise TrunkRefused(
                RefusalReason.UNKNOWN_CONTRIBUTION,
                f"slot {name.slot} sends a backward for window {name.window}, micro-batch "
                f"{name.micro_batch}, without a forward that the trunk still holds.",
            )
        if last != (self._last.get(name.slot) == name.micro_batch):
            raise _invalid(
                f"the backward of slot {name.slot}, window {name.window}, micro-batch "
                f"{name.micro_batch}, says that it is {'' if last else 'not '}the last one, and its "
                "forward said otherwise."
            )
        return next(one for one in batch.passes if name.slot in [rows.slot for rows in one.rows])

    def put(self, waiting: Waiting, *, last: bool) -> None:
        """Let a call that has been checked wait for the others of its batch."""
        name = waiting.item.name
        batch = self._batches.setdefault(name.micro_batch, Batch(name.micro_batch))
        batch.calls[name.slot] = waiting
        if last:
            self._last[name.slot] = name.micro_batch

    def start_ready(self, present: Collection[int] | None, num_planned: int) -> None:
        """Start every batch that has all of its calls.

        Args:
            present: Who takes part in the open window now; None: that is not known yet.
            num_planned: How many had planned it, with those who have left.
        """
        if present is None:
            return
        for batch in self._in_order():
            if batch.calls and batch.gathers and not self._missing(batch, present):
                if batch.stage is Stage.FORWARDS:
                    left = num_planned - len(present)
                    self._num_batches += 1
                    self._num_partial += left > 0
                self._start(batch, batch.take())

    def forwarded(self, batch: Batch, passes: list[JointPass], slots: Iterable[int]) -> None:
        """Note a forward that has been computed for ``slots``; their backwards are waited for."""
        batch.passes, batch.members = passes, set(slots)
        batch.stage = Stage.BACKWARDS
        self._num_passes += len(passes)

    def late(self, present: Collection[int]) -> set[int] | None:
        """Return the slots among ``present`` whose calls the others wait for.

        They are those of the first batch that is not done: everything later may wait for its replies,
        and to it each slot can give its part without anybody's help.

        Returns:
            The slots; empty: every batch that was begun is done. None: nobody is late, for that batch
            is computed now.
        """
        for index in range(len(self._batches) + 1):
            batch = self._batches.get(index) or Batch(index)
            missing = self._missing(batch, present) if batch.gathers else set()
            if batch.stage is Stage.DONE or (batch.gathers and not missing and not batch.calls):
                continue
            return missing or None
        return set()

    def remove(self, slot: int) -> list[Waiting]:
        """Take a slot out that has left; return its calls that wait."""
        removed = [batch.calls.pop(slot) for batch in self._in_order() if slot in batch.calls]
        for batch in self._in_order():
            batch.members.discard(slot)
        return removed

    def remove_all(self) -> list[Waiting]:
        """Take everybody out: the round is over; return the calls that wait."""
        removed = [call for batch in self._in_order() for call in batch.calls.values()]
        self._batches.clear()
        return removed

    def next_window(self) -> None:
        """Begin the next window: the trunk has stepped with this one."""
        self._batches, self._last = {}, {}
        self.total.clear()

    def _in_order(self) -> Iterator[Batch]:
        return iter([self._batches[index] for index in sorted(self._batches)])

    def _missing(self, batch: Batch, present: Collection[int]) -> set[int]:
        """Return whose call a batch that gathers still waits for."""
        if batch.stage is Stage.FORWARDS:
            wanted = {
                s for s in present if self._last.get(s, batch.micro_batch) >= batch.micro_batch
            }
        else:
            wanted = batch.members.intersection(present)
        return wanted - batch.calls.keys()


def _invalid(message: str) -> TrunkRefused:
    return TrunkRefused(RefusalReason.INVALID_REQUEST, message)
