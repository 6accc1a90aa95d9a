"""Calls what surrounds the rounds of one run: central evaluation, callbacks, early stopping, history."""

import logging
import math
import time
from collections.abc import Callable, Mapping

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result

from flower_split.config.early_stopping import SCORES
from flower_split.errors import ConfigError
from flower_split.server.additions import Additions, EndedRound, GlobalModel
from flower_split.server.early_stopping import reason_to_stop
from flower_split.server.recorder import Recorder
from flower_split.server.rounds import RoundEnd, RoundHooks

logger = logging.getLogger(__name__)

ModelOf = Callable[[int, ArrayRecord], GlobalModel]
"""Returns what the ServerApp has of the model, of a round and its global adapter."""


class RunHooks(RoundHooks):
    """The hooks of one run.

    Args:
        additions: The app's own.
        recorder: Where metrics and notes go.
        model_of: Makes what ``evaluate_fn`` and callbacks are given.

    Attributes:
        result: Flower's history of the rounds of this process.
    """

    def __init__(self, additions: Additions, recorder: Recorder, model_of: ModelOf) -> None:
        self.result = Result()
        self._additions = additions
        self._recorder = recorder
        self._model_of = model_of

    def started(self, server_round: int) -> None:
        """See :class:`RoundHooks`."""
        for callback in self._additions.callbacks:
            callback.round_started(server_round, self._recorder.config)

    def ended(self, end: RoundEnd) -> str:
        """See :class:`RoundHooks`; all callbacks are called, whichever of them wants to stop."""
        model = self._model_of(end.server_round, end.arrays)
        central = self._evaluate(model)
        self._remember(end, central)
        ended = EndedRound(
            model=model,
            train_metrics=end.trained,
            evaluate_metrics=end.evaluated,
            central=central,
            train_loss=self._recorder.train_loss(end.server_round),
            eval_loss=self._recorder.eval_loss(end.server_round),
        )
        reasons = [callback.round_ended(ended) or "" for callback in self._additions.callbacks]
        reasons.append(self._no_improvement(ended))
        return self._noted(end.server_round, next(filter(None, reasons), ""))

    def resumed(self, server_round: int) -> str:
        """Return why a run that goes on after its committed rounds has nothing left to do."""
        config, records = self._recorder.config.early_stopping, self._recorder.run.metrics()
        return self._noted(server_round, reason_to_stop(config, records, {}))

    def run_ended(self) -> None:
        """Tell the callbacks that the last round is done."""
        for callback in self._additions.callbacks:
            callback.run_ended(self.result)

    def _noted(self, server_round: int, why: str) -> str:
        """Return ``why``, having said so in log and report where it ends the run before its time."""
        last = self._recorder.config.num_server_rounds
        if why and server_round < last:
            note = f"The run stopped after round {server_round} of {last}: {why.rstrip('.')}."
            logger.info("%s", note)
            self._recorder.notes.append(note)
        return why

    def _evaluate(self, model: GlobalModel) -> Mapping[str, int | float]:
        """Run the central evaluation, and record it.

        Raises:
            ConfigError: It returns something else than numbers by name.
        """
        if self._additions.evaluate_fn is None:
            return {}
        start = time.monotonic()
        found = self._additions.evaluate_fn(model)
        if found is None:
            return {}
        metrics: dict[str, int | float] = {}
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, int | float):
                raise ConfigError(
                    "evaluate_fn must return numbers by name, or None; round "
                    f"{model.server_round} has {name!r}: {value!r}."
                )
            metrics[name] = value
        seconds = time.monotonic() - start
        logger.info(
            "round %d, evaluated centrally in %.1f s: %s",
            model.server_round,
            seconds,
            "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()),
        )
        self._recorder.central(model.server_round, metrics, seconds)
        return metrics

    def _remember(self, end: RoundEnd, central: Mapping[str, int | float]) -> None:
        self.result.arrays = end.arrays
        for metrics, history in (
            (end.trained, self.result.train_metrics_clientapp),
            (end.evaluated, self.result.evaluate_metrics_clientapp),
            (MetricRecord(dict(central)) if central else None, self._central_history),
        ):
            if metrics is not None:
                history[end.server_round] = metrics

    @property
    def _central_history(self) -> dict[int, MetricRecord]:
        return self.result.evaluate_metrics_serverapp

    def _no_improvement(self, ended: EndedRound) -> str:
        """Return why early stopping ends the run; empty: it does not.

        Raises:
            ConfigError: The metric is one that evaluate_fn has not returned, or a score that neither the
                task nor evaluation.text-scores has.
        """
        config = self._recorder.config.early_stopping
        if not config.metric:
            return ""
        losses = {"train-loss": ended.train_loss, "eval-loss": ended.eval_loss}
        value = losses.get(config.metric)
        if config.metric in SCORES and ended.eval_loss is not None:
            value = self._score(config.metric, ended.server_round)
        if config.central_name and ended.central:
            if config.central_name not in ended.central:
                raise ConfigError(
                    f"early-stopping.metric is {config.metric!r}, but evaluate_fn returned "
                    f"{', '.join(ended.central)} after round {ended.server_round}."
                )
            value = ended.central[config.central_name]
        now = {} if value is None else {ended.server_round: float(value)}
        if any(math.isnan(number) for number in now.values()):
            logger.warning("round %d: %s is not a number", ended.server_round, config.metric)
        return reason_to_stop(config, self._recorder.run.metrics(), now)

    def _score(self, metric: str, server_round: int) -> float:
        """Return a score of an evaluated round.

        Raises:
            ConfigError: The run has no such score.
        """
        scores = self._recorder.scores(server_round)
        name = metric.replace("-", "_")
        if name not in scores:
            raise ConfigError(
                f"early-stopping.metric is {metric!r}, and this run's evaluations have "
                f"{', '.join(sorted(scores)) or 'no score'} beside the loss. Look at one of them, set "
                "evaluation.text-scores, or look at eval-loss."
            )
        return scores[name]
