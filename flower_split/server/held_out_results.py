"""Held-out results of a run by round and client: of the global model, and of each client's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flower_split.config import ModelConfig
from flower_split.messages.replies import LOSS_SUM, NUM_TOKENS, PERSONAL, personal_of
from flower_split.runs.files import Json
from flower_split.runs.summary import HeldOut, pool
from flower_split.training.scores import scores_of, sums_in

ByClient = dict[int, HeldOut]


@dataclass(frozen=True, slots=True)
class HeldOutResults:
    """What clients reported of their held-out data, and what a line of metrics says of it."""

    model: ModelConfig  # the task and its classes
    _shared: dict[int, ByClient] = field(default_factory=dict)  # round -> partition
    _personal: dict[int, ByClient] = field(default_factory=dict)  # the same, of clients' own models

    def add(
        self, server_round: int, partition_id: int, metrics: Mapping[str, float]
    ) -> dict[str, Json]:
        """Remember one client's evaluation; return its line's fields."""
        sums, personal = sums_in(metrics), personal_of(metrics)
        found = HeldOut(metrics[LOSS_SUM], int(metrics[NUM_TOKENS]), sums)
        self._shared.setdefault(server_round, {})[partition_id] = found
        line: dict[str, Json] = {
            "perplexity": found.perplexity,
            **{n: v for n, v in metrics.items() if n not in sums and not n.startswith(PERSONAL)},
            **scores_of(sums, self.model),
        }
        if sums:
            line["sums"] = sums
        if LOSS_SUM in personal:
            own = HeldOut(personal[LOSS_SUM], found.num_tokens, sums_in(personal))
            self._personal.setdefault(server_round, {})[partition_id] = own
            line |= {"personal_sums": personal, **self._personal_fields([own])}
        return line

    def load(self, server_round: int, record: Mapping[str, Json]) -> None:
        """Remember what a line of an earlier process says."""
        sums, personal = record.get("sums"), record.get("personal_sums")
        metrics = {
            LOSS_SUM: _number(record["loss_sum"]),
            NUM_TOKENS: _number(record["num_tokens"]),
        }
        if isinstance(sums, Mapping):
            metrics |= {name: _number(value) for name, value in sums.items()}
        if isinstance(personal, Mapping):
            metrics |= {PERSONAL + name: _number(value) for name, value in personal.items()}
        self.add(server_round, int(_number(record["partition_id"])), metrics)

    def of_round(self, server_round: int) -> Mapping[int, HeldOut]:
        """Return the global model's results of a round, by partition."""
        return self._shared.get(server_round, {})

    def personal_of_round(self, server_round: int) -> Mapping[int, HeldOut]:
        """Return the results of the clients' own models, by partition."""
        return self._personal.get(server_round, {})

    def pooled(self, server_round: int) -> HeldOut | None:
        """Return all clients' results of a round together; None where nobody evaluated."""
        results = self.of_round(server_round)
        return pool(results.values()) if results else None

    def scores(self, server_round: int) -> dict[str, float]:
        """Return a round's scores over all clients that evaluated, by name."""
        together = self.pooled(server_round)
        return {} if together is None else scores_of(together.sums, self.model)

    def personal_fields(self, server_round: int) -> dict[str, float]:
        """Return what a round's line says of the clients' own models; empty: nothing."""
        results = self.personal_of_round(server_round)
        return self._personal_fields(list(results.values())) if results else {}

    def _personal_fields(self, results: list[HeldOut]) -> dict[str, float]:
        together = pool(results)
        scores = {"perplexity": together.perplexity, **scores_of(together.sums, self.model)}
        return {f"personal_{name}": value for name, value in scores.items()}


def _number(value: Json) -> float:
    return float(str(value))
