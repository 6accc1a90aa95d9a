"""Where a round stands in the run, and what is measured while it trains.

``num_tokens`` counts label tokens (after the causal shift of a causal language model), or records, where
the task has one label for each. Times are wall-clock seconds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundPosition:
    """Where a round stands in the run, for one client."""

    server_round: int  # from 1
    num_server_rounds: int
    num_steps: int  # this client's optimizer steps per round
    partition_id: int
    epoch_micro_batches: int = 0  # of a pass over the data; 0: steps do not end with a pass

    def micro_batches_in(self, step: int, accumulate: int) -> int:
        """Return how many micro-batches optimizer step ``step`` of the round takes.

        Rounds of whole epochs end every pass over the data with a step of what is left of it, so
        that each example is used once per epoch.

        Args:
            step: Within the round, from 0.
            accumulate: ``train.gradient_accumulation_steps``.
        """
        if not self.epoch_micro_batches:
            return accumulate
        steps_per_epoch = math.ceil(self.epoch_micro_batches / accumulate)
        done = step % steps_per_epoch * accumulate
        return min(accumulate, self.epoch_micro_batches - done)

    @property
    def first_step(self) -> int:
        """The run's optimizer step, from 0, with which this round begins."""
        return (self.server_round - 1) * self.num_steps

    @property
    def total_steps(self) -> int:
        """This client's optimizer steps over the whole run."""
        return self.num_server_rounds * self.num_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step; times add up to its wall-clock time when one micro-batch is in flight."""

    step: int  # within the round, from 0
    loss: float  # mean over label tokens
    num_tokens: int
    compute_seconds: float  # on this client
    wait_seconds: float  # in the trunk's queue, or for the other clients of the window
    trunk_seconds: float  # computing on the trunk
    wire_seconds: float  # the rest of the calls
    bytes_sent: int
    bytes_received: int
    gradient_bytes_sent: int = 0  # of bytes_sent, in backwards
    gradient_bytes_received: int = 0  # of bytes_received, in backwards
    learning_rate: float = 0.0  # the client's
    grad_norm: float = 0.0  # L2, before clipping: of the client's own parameters, or over the model


@dataclass(frozen=True, slots=True)
class TrainResult:
    """One round's training on one client."""

    steps: list[StepMetrics]
    num_examples: int
    optimizer_state: Mapping[str, Tensor] = field(default_factory=dict)  # where it is kept

    @property
    def num_tokens(self) -> int:
        """Label tokens over the round."""
        return sum(step.num_tokens for step in self.steps)

    @property
    def loss(self) -> float:
        """Mean token loss over the round."""
        return sum(step.loss * step.num_tokens for step in self.steps) / self.num_tokens

    @property
    def bytes_sent(self) -> int:
        """Bytes to the trunk over the round."""
        return sum(step.bytes_sent for step in self.steps)

    @property
    def bytes_received(self) -> int:
        """Bytes from the trunk over the round."""
        return sum(step.bytes_received for step in self.steps)

    def step_lists(self) -> dict[str, list[int] | list[float]]:
        """Return each measure of the steps as a list, by its name."""
        names = [item.name for item in fields(StepMetrics) if item.name != "step"]
        return {name: [getattr(step, name) for step in self.steps] for name in names}


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Held-out loss."""

    loss_sum: float  # nats
    num_tokens: int
    num_examples: int
    bytes_sent: int = 0  # to a trunk that is elsewhere
    bytes_received: int = 0  # from it
    sums: Mapping[str, float] = field(default_factory=dict)  # see flower_split.training.scores
    personal: "EvalResult | None" = None  # of the client's own model, where it is asked for
