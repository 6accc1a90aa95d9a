"""What an app may add to a run in the ServerApp: a central evaluation, and callbacks around rounds.

Given to :func:`flower_split.server.app.make_server_app`. All of it is called in the ServerApp's one
thread, between rounds, while nobody trains; the time that it takes is added to the round's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.lora import load_adapter_state
from flower_split.messages.arrays import from_arrays


@dataclass(frozen=True, kw_only=True)
class GlobalModel:
    """What the ServerApp has of the model after a round: adapters. It holds no base weights."""

    server_round: int
    """The round; 0: before the first."""
    config: RunConfig
    """The run's configuration; ``config.app`` has the keys of the app's own."""
    arrays: ArrayRecord
    """The clients' global adapter, as Flower's strategies see it."""
    read_trunk: Callable[[], Mapping[str, Tensor]]
    read_base_change: Callable[[], Mapping[str, Tensor]]

    @cached_property
    def client_adapter(self) -> Mapping[str, Tensor]:
        """The clients' global adapter, of bottom and top: fp32, by the unsplit model's names."""
        return from_arrays(self.arrays)

    @cached_property
    def trunk_adapter(self) -> Mapping[str, Tensor]:
        """The trunk's adapter of this round: fp32, by the unsplit model's names.

        It is asked of the trunk when it is read first, and must be read before the next round begins.
        Empty where the trunk does not train. Reading raises TrunkError where the trunk is lost.
        """
        return self.read_trunk()

    @cached_property
    def base_change(self) -> Mapping[str, Tensor]:
        """The low-rank change beside the base of methods that change it; empty for all others."""
        return self.read_base_change()

    def load_into(self, model: nn.Module) -> None:
        """Load both adapters into the unsplit model.

        Args:
            model: Unsplit, with the run's LoRA: see :func:`flower_split.lora.attach_lora` and
                :func:`flower_split.parties.parts.all_parts`.

        Raises:
            ConfigError: The aggregation has changed the base itself, which an adapter does not hold.
        """
        if self.base_change:
            raise ConfigError(
                f'strategy.aggregator = "{self.config.strategy.aggregator}" changes the base, so the '
                "adapters alone are not the model. Add base_change to the base weights yourself, or "
                "use a method that leaves the base as it is."
            )
        load_adapter_state(model, {**self.client_adapter, **self.trunk_adapter})


EvaluateFn = Callable[[GlobalModel], Mapping[str, int | float] | MetricRecord | None]
"""Evaluates the global model in the ServerApp, before round 1 and after every round.

Returns its metrics by name, which go to ``metrics.jsonl`` (kind "central") and to Flower's history
(``Result.evaluate_metrics_serverapp``); None: it has measured nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndedRound:
    """One round that is committed and evaluated."""

    model: GlobalModel
    train_metrics: MetricRecord | None  # as the inner strategy aggregated them; round 0: None
    evaluate_metrics: (
        MetricRecord | None
    )  # the same of the clients' evaluation; None: there was none
    central: Mapping[str, int | float]  # of evaluate_fn; empty: there was none
    train_loss: float | None  # nats per label token, over the round's clients
    eval_loss: float | None  # nats per held-out label token, over the clients that evaluated

    @property
    def server_round(self) -> int:
        """The round; 0: the evaluation before the first."""
        return self.model.server_round


class RunCallback:
    """Hooks around the rounds of a run; override those that you need.

    They are called in the order of the callbacks. What they raise ends the run with that error; its
    committed rounds stay, and the run can be resumed. A process that is lost between a round and its
    hooks calls :meth:`round_ended` of that round again when the run is resumed, and no hook of rounds
    before it: keep nothing that a new process could not know.
    """

    def round_started(self, server_round: int, config: RunConfig) -> None:
        """Note that a round begins, from 1; once, however often it is tried again."""

    def round_ended(self, ended: EndedRound) -> str | None:
        """Note that a round is committed and evaluated; from 0, the evaluation before the first.

        Returns:
            Why the run should stop now, in words for its report; None or empty: it goes on. All clients
            evaluate the last round of a run that stops, as they do at its planned end.
        """
        return None

    def run_ended(self, result: Result) -> None:
        """Note that the last round is done, with Flower's history of the rounds of this process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Additions:
    """What an app adds to the runs of its ServerApp; by default nothing."""

    evaluate_fn: EvaluateFn | None = None
    callbacks: Sequence[RunCallback] = field(default_factory=tuple)
