"""What local training asks of a trunk that is elsewhere; it knows nothing of how calls travel."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from flower_split.training.step_end import StepEndingTrunk


@dataclass(frozen=True, slots=True)
class CallStats:
    """Totals over the calls of a session; retries count once.

    Bytes are those of frames; gradients are those of backwards and ends of steps.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    wire_seconds: float = 0.0  # from a call's start to its end, less the trunk's two shares below
    trunk_compute_seconds: float = 0.0  # as the trunk reports it
    trunk_queue_seconds: float = 0.0  # at the trunk: for its processor, and for the other clients
    calls: int = 0  # forwards, backwards and ends of steps
    gradient_bytes_sent: int = 0  # of bytes_sent
    gradient_bytes_received: int = 0  # of bytes_received


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
