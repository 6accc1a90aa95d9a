"""The local-only baseline's messages: train alone, then evaluate everybody's adapter.

Both go by message types of their own, beside Flower's ``train`` and ``evaluate``. An adapter here is
one of the whole model, and no trunk takes part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from flower_split.errors import FederationError
from flower_split.messages import keys
from flower_split.messages.carrier import Fields, stamped
from flower_split.messages.replies import scalars, sole_adapter

ACTION = "local_only"
"""Name of the ClientApp's further handlers for training and for evaluation."""


@dataclass(frozen=True, slots=True)
class LocalOnlyTrainOrder:
    """Asks a client to train all three parts alone."""

    message_type: ClassVar[str] = f"train.{ACTION}"

    def write(self) -> RecordDict:
        """Return the content that travels."""
        return RecordDict({keys.CONFIG: stamped({})})

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Read an order.

        Raises:
            FederationError: It was written by another version.
        """
        Fields.of(content, "the local-only baseline's training order")
        return cls()


@dataclass(frozen=True, slots=True)
class LocalOnlyTrainReply:
    """The adapter that a client has trained alone."""

    adapter: ArrayRecord

    def write(self) -> RecordDict:
        """Return the content that travels."""
        return RecordDict({keys.ARRAYS: self.adapter, keys.REPLY: stamped({})})

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Read a reply.

        Raises:
            FederationError: It was written by another version, or holds no adapter.
        """
        Fields.of(content, "the local-only baseline's training reply")
        return cls(sole_adapter(content))


@dataclass(frozen=True, slots=True)
class LocalOnlyEvaluateOrder:
    """Asks a client for the held-out loss of several adapters."""

    message_type: ClassVar[str] = f"evaluate.{ACTION}"

    adapters: Mapping[int, ArrayRecord]  # by the partition of the client that trained it

    def write(self) -> RecordDict:
        """Return the content that travels."""
        records = {str(partition): record for partition, record in self.adapters.items()}
        return RecordDict({**records, keys.CONFIG: stamped({})})

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Read an order.

        Raises:
            FederationError: It was written by another version, or names an adapter by no partition.
        """
        what = "the local-only baseline's evaluation order"
        Fields.of(content, what)
        return cls({_partition(name, what): r for name, r in content.array_records.items()})


@dataclass(frozen=True, slots=True)
class LocalOnlyEvaluateReply:
    """The held-out loss of several adapters on one client's data."""

    losses: Mapping[int, tuple[float, int]]  # trained by partition → (nats, label tokens)

    def write(self) -> RecordDict:
        """Return the content that travels."""
        metrics: dict[str, int | float] = {}
        for partition, (loss_sum, num_tokens) in self.losses.items():
            metrics[f"{partition}.{keys.LOSS_SUM}"] = loss_sum
            metrics[f"{partition}.{keys.NUM_TOKENS}"] = num_tokens
        return RecordDict({keys.METRICS: MetricRecord(dict(metrics)), keys.REPLY: stamped({})})

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Read a reply.

        Raises:
            FederationError: It was written by another version, or a number is missing.
        """
        what = "the local-only baseline's evaluation reply"
        Fields.of(content, what)
        values = scalars(content)
        fields = Fields(values, what)
        partitions = {_partition(name.partition(".")[0], what) for name in values}
        return cls(
            {
                partition: (
                    fields.number(f"{partition}.{keys.LOSS_SUM}"),
                    fields.count(f"{partition}.{keys.NUM_TOKENS}"),
                )
                for partition in sorted(partitions)
            }
        )


def _partition(name: str, what: str) -> int:
    if not name.isdecimal():
        raise FederationError(
            f"{what} cannot be read: it names {name!r} where a partition id belongs. Run the same "
            "version of flower_split on every machine."
        )
    return int(name)
