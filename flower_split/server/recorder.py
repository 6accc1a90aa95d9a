"""Record a run: metrics by step, client and round, and the final summary."""

import io
import logging
import time
from collections.abc import Mapping, Sequence

from rich.console import Console

from flower_split.aggregation.adapter_aggregator import RoundSummary
from flower_split.config import RunConfig
from flower_split.messages.client_facts import ClientFacts
from flower_split.messages.replies import (
    BYTES_RECEIVED,
    BYTES_SENT,
    EVAL_LOSS,
    NUM_TOKENS,
    TRAIN_LOSS,
)
from flower_split.protocol.values import RoundReport
from flower_split.runs.directory import RunDirectory
from flower_split.runs.files import Json
from flower_split.runs.outcome import RoundOutcome
from flower_split.runs.run_facts import exclusions, lateness, truncation
from flower_split.runs.summary import ClientOutcome, HeldOut, print_summary, summarize
from flower_split.server.held_out_results import HeldOutResults
from flower_split.server.traffic import Traffic, trunk_calls

logger = logging.getLogger(__name__)

BOTTOM_DOES_NOT_TRAIN = (
    'Mode "forward-only" sends no gradient to the bottom, and train.auxiliary-head is off: the '
    "bottom's LoRA does not train in this run; only the top does."
)


class Recorder:
    """Writes to one run directory; its methods are the sinks of the strategy and the round loop.

    Args:
        run: The run's directory.
        config: The run's configuration.
    """

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        self.run = run
        self.config = config
        self.notes: list[str] = []
        self.last_round = config.num_server_rounds  # a run may stop before the planned one
        self.names: dict[int, str] = {}  # partition -> what its data is about
        if config.mode == "forward-only" and not config.train.auxiliary_head:
            self.notes.append(BOTTOM_DOES_NOT_TRAIN)
            logger.warning("%s", BOTTOM_DOES_NOT_TRAIN)
        self.traffic = Traffic()  # since the last round's lines
        self._start = time.monotonic()
        self._results = HeldOutResults(config.model)
        self._local_only: dict[int, dict[int, HeldOut]] = {}  # trained by -> evaluated on
        self._rounds: set[int] = set()
        self._round_metrics: dict[int, list[Mapping[str, float]]] = {}
        self._totals = {"num_tokens": 0.0, "bytes_sent": 0.0, "bytes_received": 0.0}

    def forget_after(self, server_round: int) -> None:
        """Load the records up to a committed round, and drop those of later rounds."""
        kept = [
            record
            for record in self.run.metrics()
            if not isinstance(record.get("server_round"), int)
            or int(str(record["server_round"])) <= server_round
        ]
        kept = [record for record in kept if not record.get("local_only")]
        self.run.replace_metrics(kept)
        for record in kept:
            number = record.get("server_round")
            if record["kind"] == "round" and isinstance(number, int):
                self._rounds.add(number)
                for name in self._totals:
                    value = record.get(name)
                    self._totals[name] += value if isinstance(value, (int, float)) else 0.0
            elif record["kind"] == "evaluation" and isinstance(number, int):
                self._results.load(number, record)

    def clients(self, facts: Mapping[int, ClientFacts]) -> None:
        """Record what every client says of its data, by partition, before it trains."""
        self.names = {partition_id: item.name for partition_id, item in facts.items()}
        for partition_id, item in sorted(facts.items()):
            self.run.append(
                "data",
                {
                    "server_round": max(self._rounds, default=0),
                    "partition_id": partition_id,
                    "name": item.name,
                    "num_examples": item.num_examples,
                    "num_eval_examples": item.num_eval_examples,
                    "planned_steps": item.planned_steps,
                },
            )

    def has_round(self, server_round: int) -> bool:
        """Return whether the round's evaluation and its line in the metrics are there."""
        return server_round in self._rounds

    def steps(
        self,
        server_round: int,
        partition_id: int,
        lists: Mapping[str, Sequence[float]],
        metrics: Mapping[str, float],
    ) -> None:
        """Record one client's round, one line for each step, from its per-step lists."""
        count = max((len(values) for values in lists.values()), default=0)
        for index in range(count):
            values = {name: items[index] for name, items in lists.items() if index < len(items)}
            self.run.append(
                "step",
                {
                    "server_round": server_round,
                    "partition_id": partition_id,
                    "step": index,
                    **values,
                },
            )
        self._round_metrics.setdefault(server_round, []).append(dict(metrics))
        activations, gradients = trunk_calls(lists)
        self.traffic.add(partition_id, "activations", up=activations[0], down=activations[1])
        self.traffic.add(partition_id, "gradients", up=gradients[0], down=gradients[1])

    def trunk_round(self, server_round: int, attempt: int, report: RoundReport) -> None:
        """Record a round on the trunk: steps, time, activation memory, and who was left out."""
        activations, batches = report.activations, report.batches
        self.run.append(
            "trunk",
            {
                "server_round": server_round,
                "attempt": attempt,
                "version": report.version,
                "optimizer_steps": report.optimizer_steps,
                "compute_seconds": report.compute_seconds,
                "activation_peak_bytes": activations.peak_bytes,
                "activation_budget_bytes": activations.budget_bytes,
                "activation_recomputes": activations.recomputes,
                "activation_refusals": activations.refusals,
                "batches": batches.batches,
                "partial_batches": batches.partial,
                "sums_again": batches.sums_again,
                "left_out": {
                    str(item.slot): item.problem for item in report.slots if not item.completed
                },
            },
        )

    def aggregation(self, server_round: int, summary: RoundSummary) -> None:
        """Record whose adapters became the next one, and who was excluded why."""
        self.run.append(
            "aggregation",
            {
                "server_round": server_round,
                "clients": [str(client) for client in summary.clients],
                "excluded": {str(client): why for client, why in summary.excluded.items()},
                "unchanged_modules": list(summary.unchanged),
                "truncation": summary.truncation,
                "seconds": summary.seconds,
            },
        )

    def arrivals(
        self, server_round: int, records: Sequence[Mapping[str, int | float | str]]
    ) -> None:
        """Record who arrived for an asynchronous round, in this order, and who was dropped why."""
        for record in records:
            self.run.append("arrival", {"server_round": server_round, **record})

    def evaluation(
        self, server_round: int, partition_id: int, metrics: Mapping[str, float]
    ) -> None:
        """Record one client's held-out result after a round; round 0 is before the first."""
        sent, received = metrics.get(BYTES_SENT, 0), metrics.get(BYTES_RECEIVED, 0)
        self.traffic.add(partition_id, "evaluation", up=sent, down=received)
        line = self._results.add(server_round, partition_id, metrics)
        place = {"server_round": server_round, "partition_id": partition_id}
        self.run.append("evaluation", {**place, **line})

    def central(
        self, server_round: int, metrics: Mapping[str, int | float], seconds: float
    ) -> None:
        """Record what the app's own evaluation in the ServerApp measured."""
        self.run.append(
            "central",
            {"server_round": server_round, "metrics": dict(metrics), "seconds": seconds},
        )

    def local_only(self, trained_by: int, evaluated_on: int, result: HeldOut) -> None:
        """Record the held-out result of a model that one client trained alone."""
        self._local_only.setdefault(evaluated_on, {})[trained_by] = result
        self.run.append(
            "evaluation",
            {
                "phase": "baseline",
                "server_round": self.last_round,
                "local_only": True,
                "trained_by": trained_by,
                "partition_id": evaluated_on,
                "loss_sum": result.loss_sum,
                "num_tokens": result.num_tokens,
                "perplexity": result.perplexity,
            },
        )

    def round_done(self, outcome: RoundOutcome) -> None:
        """Log and record a finished round."""
        server_round = outcome.server_round
        clients = self._round_metrics.get(server_round, [])
        record: dict[str, Json] = {"server_round": server_round, "seconds": outcome.seconds}
        last = self.config.num_server_rounds
        parts = [f"round {server_round}/{last} done" if server_round else "before round 1"]
        tokens = sum(item.get(NUM_TOKENS, 0) for item in clients)
        if tokens:
            loss = self.train_loss(server_round) or 0.0
            sent, received = (
                sum(item.get(name, 0) for item in clients) for name in (BYTES_SENT, BYTES_RECEIVED)
            )
            record |= {TRAIN_LOSS: loss, "num_tokens": tokens}
            record |= {"bytes_sent": sent, "bytes_received": received}
            for name, value in (
                ("num_tokens", tokens),
                ("bytes_sent", sent),
                ("bytes_received", received),
            ):
                self._totals[name] += value
            parts.append(f"train_loss {loss:.4f}")
        held_out = self._results.pooled(server_round)
        if held_out is not None:
            record[EVAL_LOSS] = self.eval_loss(server_round)
            record["perplexity"] = held_out.perplexity
            evaluated = sorted(self._results.of_round(server_round))
            record["evaluated"] = evaluated
            missing = len(self.names) > len(evaluated)
            whose = f" (of partitions {', '.join(map(str, evaluated))} only)" if missing else ""
            parts.append(f"held-out perplexity {held_out.perplexity:.2f}{whose}")
            scores = self.scores(server_round)
            record |= {**scores, **self._results.personal_fields(server_round)}
            parts += [f"{name} {value:.3f}" for name, value in scores.items()]
        if tokens:
            rate = tokens / max(outcome.seconds, 1e-9)
            megabytes = (sent + received) / 1e6
            parts += [f"{rate:.0f} tokens/s", f"{megabytes:.1f} MB to and from the trunk"]
        if server_round:
            parts.append(f"{outcome.seconds:.1f} s")
        logger.info("%s", "  ".join(parts))
        self.run.append("round", record)
        self._append_traffic(server_round)
        self._rounds.add(server_round)

    def _append_traffic(self, server_round: int) -> None:
        for partition_id, counts in self.traffic.take().items():
            self.run.append(
                "bytes", {"server_round": server_round, "partition_id": partition_id, **counts}
            )

    def train_loss(self, server_round: int) -> float | None:
        """Return the mean loss of a round's training, in nats per label token; None: there was none."""
        clients = self._round_metrics.get(server_round, [])
        tokens = sum(item.get(NUM_TOKENS, 0) for item in clients)
        if not tokens:
            return None
        return sum(i.get(TRAIN_LOSS, 0) * i.get(NUM_TOKENS, 0) for i in clients) / tokens

    def eval_loss(self, server_round: int) -> float | None:
        """Return a round's held-out loss, in nats per label token; None where nobody evaluated."""
        held_out = self._results.pooled(server_round)
        return None if held_out is None else held_out.loss_sum / max(held_out.num_tokens, 1)

    def scores(self, server_round: int) -> dict[str, float]:
        """Return a round's held-out scores over all clients that evaluated, by name."""
        return self._results.scores(server_round)

    def finish(self, facts: Mapping[str, int | float | str]) -> None:
        """Write summary and report, and show the table in the log."""
        first, last = self._results.of_round(0), self._results.of_round(self.last_round)
        own = self._results.personal_of_round(self.last_round)
        outcomes = [
            ClientOutcome(
                partition_id=partition_id,
                before=first[partition_id],
                after=last[partition_id],
                local_only=self._by_own(partition_id),
                personal=own.get(partition_id),
                name=self.names.get(partition_id, ""),
            )
            for partition_id in sorted(first.keys() & last.keys())
        ]
        rows = summarize(outcomes, self.config.model) if outcomes else []
        seconds = time.monotonic() - self._start
        self._append_traffic(self.last_round)  # of the baseline
        totals = {"label tokens trained": int(self._totals["num_tokens"])}
        aggregations = self.run.metrics("aggregation")
        kept = {**truncation(aggregations), **lateness(self.run.metrics("arrival"))}
        all_facts = {"seconds": round(seconds, 1), **totals, **kept, **facts}
        notes = [*self.notes, *exclusions(aggregations)]
        self.run.write_outcome(rows, facts=all_facts, notes=notes)
        if rows:
            text = io.StringIO()
            print_summary(Console(file=text, width=110), rows, self.run.path)
            logger.info("\n%s", text.getvalue().rstrip())
        else:
            logger.info("run directory: %s", self.run.path)

    def _by_own(self, partition_id: int) -> dict[int, HeldOut]:
        """Return the results of the model that a partition trained alone, by partition."""
        return {
            evaluated_on: results[partition_id]
            for evaluated_on, results in sorted(self._local_only.items())
            if partition_id in results
        }
