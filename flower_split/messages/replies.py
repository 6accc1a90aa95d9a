"""What a client answers: the adapter and its numbers, per-step lists, initial values.

A training reply holds one ArrayRecord (full fp32 adapter weights, sorted by name) and one MetricRecord,
as Flower's strategies and mods expect, and everything else in one ConfigRecord of this package's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flower_split.errors import FederationError
from flower_split.messages import keys
from flower_split.messages.carrier import Fields, Value, numbers_of, stamped
from flower_split.training.scores import sums_in

# Metrics by name, for whoever weighs, checks or records them.
TRAIN_LOSS, EVAL_LOSS, LOSS_SUM = keys.TRAIN_LOSS, keys.EVAL_LOSS, keys.LOSS_SUM
NUM_TOKENS, NUM_EXAMPLES = keys.NUM_TOKENS, keys.NUM_EXAMPLES
PERSONAL = keys.PERSONAL
BYTES_SENT, BYTES_RECEIVED = keys.BYTES_SENT, keys.BYTES_RECEIVED
UNIFORM_WEIGHT = keys.UNIFORM_WEIGHT  # 1, where a strategy weighs clients equally by a metric

WEIGHT_METRICS: Mapping[str, str] = MappingProxyType(
    {"tokens": NUM_TOKENS, "examples": NUM_EXAMPLES, "uniform": UNIFORM_WEIGHT}
)
"""``strategy.weighting`` → the metric by which Flower's strategies weigh a client."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReply:
    """One round's training of one client."""

    adapter: ArrayRecord  # full weights; those that stay with the client are left out
    train_loss: float  # mean over label tokens
    num_tokens: int  # label tokens
    num_examples: int
    bytes_sent: int  # to the trunk
    bytes_received: int  # from the trunk
    steps: Mapping[str, list[int] | list[float]]  # per-step lists by name, all equally long
    weight_norms: Mapping[str, bytes] = field(
        default_factory=dict
    )  # module → fp32, where asked for
    private_digest: str = ""  # of the weights that the client has kept; empty: it keeps none

    def write(self) -> RecordDict:
        """Return the content that travels."""
        values: dict[str, Value] = {
            **{keys.STEPS + name: list(values) for name, values in self.steps.items()},
            **{keys.WEIGHT_NORMS + module: norms for module, norms in self.weight_norms.items()},
        }
        if self.private_digest:
            values[keys.PRIVATE_DIGEST] = self.private_digest
        metrics: dict[str, int | float] = {
            keys.TRAIN_LOSS: self.train_loss,
            keys.NUM_TOKENS: self.num_tokens,
            keys.NUM_EXAMPLES: self.num_examples,
            keys.BYTES_SENT: self.bytes_sent,
            keys.BYTES_RECEIVED: self.bytes_received,
        }
        return RecordDict(
            {
                keys.ARRAYS: self.adapter,
                keys.METRICS: MetricRecord(dict(metrics)),
                keys.REPLY: stamped(values),
            }
        )

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Read a reply.

        Raises:
            FederationError: It is not what this version's ClientApp sends.
        """
        what = "a training reply"
        fields, metrics = Fields.of(content, what), Fields(scalars(content), what)
        return cls(
            adapter=sole_adapter(content),
            train_loss=metrics.number(keys.TRAIN_LOSS),
            num_tokens=metrics.count(keys.NUM_TOKENS),
            num_examples=metrics.count(keys.NUM_EXAMPLES),
            bytes_sent=metrics.count(keys.BYTES_SENT),
            bytes_received=metrics.count(keys.BYTES_RECEIVED),
            steps=_steps(fields),
            weight_norms=weight_norms(content),
            private_digest=fields.text(keys.PRIVATE_DIGEST, ""),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateReply:
    """The held-out loss of one client."""

    loss_sum: float  # nats
    num_tokens: int  # label tokens
    num_examples: int
    bytes_sent: int = 0  # to the trunk
    bytes_received: int = 0  # from the trunk
    sums: Mapping[str, float] = field(default_factory=dict)  # what the task's scores are made of
    personal: Mapping[str, float] = field(default_factory=dict)
    """Loss sum and sums of the client's own model, where it is asked for; of the same label tokens."""

    def write(self) -> RecordDict:
        """Return the content that travels."""
        metrics: dict[str, int | float] = {
            keys.LOSS_SUM: self.loss_sum,
            keys.EVAL_LOSS: self.loss_sum / self.num_tokens,
            keys.NUM_TOKENS: self.num_tokens,
            keys.NUM_EXAMPLES: self.num_examples,
            keys.BYTES_SENT: self.bytes_sent,
            keys.BYTES_RECEIVED: self.bytes_received,
            **self.sums,
            **{keys.PERSONAL + name: value for name, value in self.personal.items()},
        }
        return RecordDict({keys.METRICS: MetricRecord(dict(metrics)), keys.REPLY: stamped({})})

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Read a reply; raises as :meth:`TrainReply.read` does."""
        what = "an evaluation reply"
        Fields.of(content, what)
        numbers = scalars(content)
        metrics = Fields(numbers, what)
        return cls(
            loss_sum=metrics.number(keys.LOSS_SUM),
            num_tokens=metrics.count(keys.NUM_TOKENS),
            num_examples=metrics.count(keys.NUM_EXAMPLES),
            bytes_sent=metrics.count(keys.BYTES_SENT, 0),
            bytes_received=metrics.count(keys.BYTES_RECEIVED, 0),
            sums=sums_in(numbers),
            personal=personal_of(numbers),
        )


@dataclass(frozen=True, slots=True)
class BaseValuesReply:
    """Values with which the adapter begins as the base weights say."""

    values: ArrayRecord

    def write(self) -> RecordDict:
        """Return the content that travels."""
        return RecordDict({keys.BASE_VALUES: self.values, keys.REPLY: stamped({})})

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Read a reply.

        Raises:
            FederationError: It was written by another version.
        """
        Fields.of(content, "a reply with initial values of the adapter")
        return cls(content.array_records.get(keys.BASE_VALUES, ArrayRecord()))


def sole_adapter(content: RecordDict) -> ArrayRecord:
    """Return the one ArrayRecord of a training reply.

    Raises:
        FederationError: There is none, or more than one.
    """
    records = list(content.array_records.values())
    if len(records) != 1:
        raise FederationError(
            f"a training reply must hold one ArrayRecord; it holds {len(records)}. Run the same "
            "version of flower_split on every machine."
        )
    return records[0]


def weight_norms(content: RecordDict) -> dict[str, bytes]:
    """Return what a training reply says of the norms of modules with DoRA; empty: nothing."""
    fields = Fields.find(content, "a training reply")
    found = {} if fields is None else fields.under(keys.WEIGHT_NORMS)
    return {module: norms for module, norms in found.items() if isinstance(norms, bytes)}


def private_digest(content: RecordDict) -> str:
    """Return the digest of the weights that a client has kept; empty: its reply names none."""
    fields = Fields.find(content, "a training reply")
    return "" if fields is None else fields.text(keys.PRIVATE_DIGEST, "")


def take_steps(content: RecordDict) -> tuple[RecordDict, dict[str, list[float]]]:
    """Take the per-step lists out of a training reply: no strategy looks at them.

    Returns:
        ``(a copy of the content without them, the lists by name; empty where there were none)``.

    Raises:
        FederationError: The reply was written by another version.
    """
    fields = Fields.find(content, "a training reply")
    rest = RecordDict(dict(content.items()))
    if fields is None:
        return rest, {}
    for name, record in content.config_records.items():
        kept = {key: value for key, value in record.items() if not key.startswith(keys.STEPS)}
        if kept.keys() <= set(stamped({})):
            del rest[name]
        else:
            rest[name] = ConfigRecord(kept)
    return rest, {name: numbers_of(values) for name, values in _steps(fields).items()}


def with_uniform_weight(content: RecordDict) -> RecordDict:
    """Return a copy of a reply's content whose MetricRecords hold :data:`UNIFORM_WEIGHT`, 1."""
    rest = RecordDict(dict(content.items()))
    for name, record in content.metric_records.items():
        rest[name] = MetricRecord({**dict(record.items()), UNIFORM_WEIGHT: 1.0})
    return rest


def scalars(content: RecordDict) -> dict[str, float]:
    """Return the numbers of a reply's MetricRecords, by name."""
    return {
        name: value
        for record in content.metric_records.values()
        for name, value in record.items()
        if isinstance(value, (int, float))
    }


def personal_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return loss sum and sums of a client's own model among its metrics; empty: there is none."""
    return {
        name.removeprefix(keys.PERSONAL): float(value)
        for name, value in metrics.items()
        if name.startswith(keys.PERSONAL)
    }


def _steps(fields: Fields) -> dict[str, list[int] | list[float]]:
    found = fields.under(keys.STEPS)
    return {name: list(values) for name, values in found.items() if isinstance(values, list)}
