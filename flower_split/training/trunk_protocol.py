"""What local training asks of a trunk that is elsewhere; it knows nothing of how calls travel."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from flower_split.training.step_end import StepEndingTrunk


class CallStats(Protocol):
    """Totals over the calls since they were last taken."""

    @property
    def wire_seconds(self) -> float:
        """Seconds of the calls that are neither queue nor computation."""

    @property
    def trunk_queue_seconds(self) -> float:
        """Seconds in the trunk's queue, or waiting for the other clients of a window."""

    @property
    def trunk_compute_seconds(self) -> float:
        """Seconds of the trunk's computation."""

    @property
    def bytes_sent(self) -> int:
        """Bytes to the trunk."""

    @property
    def bytes_received(self) -> int:
        """Bytes from the trunk."""

    @property
    def gradient_bytes_sent(self) -> int:
        """Bytes to the trunk in backwards, of ``bytes_sent``."""

    @property
    def gradient_bytes_received(self) -> int:
        """Bytes from the trunk in backwards, of ``bytes_received``."""


class MicroBatchTrunk(StepEndingTrunk, Protocol):
    """A remote trunk as the training loop sees it; ``flower_split.client.remote_trunk`` has one.

    Attributes:
        always: An input of every training forward that always requires grad; give it to
            ``torch.autograd.grad`` among the inputs, so that autograd calls the trunk's backward.
        waiting: Entered around every call: give back there what other micro-batches need.
    """

    always: Tensor

    @property
    def waiting(self) -> Callable[[], AbstractContextManager[object]]:
        """Entered around every call."""

    @waiting.setter
    def waiting(self, enter: Callable[[], AbstractContextManager[object]]) -> None: ...

    def micro_batch(
        self, window: int, index: int, *, num_tokens: int, loss_denominator: float, last: bool
    ) -> AbstractContextManager[None]:
        """Name the one forward made inside; called once per micro-batch, on the forward's thread."""

    def take_stats(self) -> CallStats:
        """Return the totals so far and begin anew."""

    def register_forward_pre_hook(self, hook: Callable[..., object]) -> RemovableHandle:
        """Call ``hook`` before every forward, as ``torch.nn.Module`` does."""
