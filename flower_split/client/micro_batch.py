"""Naming a training forward: which micro-batch of which window it is, and how much it counts."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flower_split.errors import TrunkError


@dataclass(slots=True)
class MicroBatch:
    """What is said of the one forward made inside a ``micro_batch`` block."""

    window: int  # the optimizer step within the round, from 0; 0 where a window is a round
    index: int  # within the window, from 0
    num_tokens: int  # label tokens
    loss_denominator: float  # what its summed token loss is divided by
    last: bool  # whether the window gets no further micro-batch from this client
    used: bool = False  # whether it has made its forward

    def __str__(self) -> str:
        return f"micro-batch {self.index} of window {self.window}"


class CurrentMicroBatch:
    """The micro-batch that each thread is inside of."""

    def __init__(self) -> None:
        self._current = threading.local()  # .value: MicroBatch or None

    @contextmanager
    def inside(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Be inside ``micro_batch``, on this thread.

        Raises:
            TrunkError: The thread is inside another one.
        """
        outer: MicroBatch | None = getattr(self._current, "value", None)
        if outer is not None:
            raise TrunkError(
                f"micro_batch(window={micro_batch.window}, index={micro_batch.index}) stands inside "
                f"{outer}; end that block first."
            )
        self._current.value = micro_batch
        try:
            yield
        finally:
            self._current.value = None

    def take(self) -> MicroBatch:
        """Return the micro-batch for the one forward that it names.

        Raises:
            TrunkError: The thread is inside none, or it has made its forward.
        """
        micro_batch: MicroBatch | None = getattr(self._current, "value", None)
        if micro_batch is None:
            raise TrunkError(
                "a training forward through the remote trunk must be made inside "
                "RemoteTrunk.micro_batch(...), on the same thread; or turn autograd off "
                "(torch.no_grad()) to evaluate."
            )
        if micro_batch.used:
            raise TrunkError(
                f"{micro_batch} has made its forward; each needs a block of its own (and gradient "
                "checkpointing must not wrap the trunk)."
            )
        micro_batch.used = True
        return micro_batch
