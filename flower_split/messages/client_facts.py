"""The handshake: what one client says of itself before the first round."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from flwr.app import Message, RecordDict

from flower_split.errors import FederationError, SplitError
from flower_split.messages import keys
from flower_split.messages.carrier import Fields, Value, stamped
from flower_split.runtime.version import __version__
from flower_split.split import CutLayers

_IGNORED = "ignored-keys"
_PUBLIC_KEY = "public-key"
_PACKS = "packs-arrays"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientFacts:
    """What one client says of itself in the handshake."""

    partition_id: int  # its data partition: its slot on the trunk
    num_partitions: int  # as its node configuration says
    num_examples: int  # training examples
    num_eval_examples: int  # held-out examples
    planned_steps: int  # optimizer steps it will take in a round
    concurrency: int  # how many clients its simulation runs at once; 0: not a simulation
    fingerprint: Mapping[str, str]  # of its model and configuration
    name: str = ""  # what its data is about, where the source says so
    lora_rank: int = 0  # its own, see flower_split.parties.client_ranks; 0: the run's
    lora_alpha: float = 0.0  # its own; 0: by the run's rule
    cuts: CutLayers | None = None  # where its model is cut; None: where the run says
    base_digests: Mapping[str, str] = field(default_factory=dict)  # of its base values' weights
    data_counts: Mapping[str, int] = field(default_factory=dict)  # see flower_split.data.DataCounts
    package_version: str = __version__  # of flower-split there; travels in every message
    too_little: str = ""  # why its data is too little to take part; empty: it is enough
    ignored_keys: tuple[str, ...] = ()  # of the run config that its version does not know, sorted
    public_key: bytes = b""  # that its tokens shall name; empty: its version makes none
    packs_arrays: bool = True  # understands packed messages; not said: its version does not

    def write(self) -> RecordDict:
        """Return the content that travels."""
        facts: dict[str, int | float | str] = {
            "partition-id": self.partition_id,
            "num-partitions": self.num_partitions,
            "num-train-examples": self.num_examples,
            "num-eval-examples": self.num_eval_examples,
            "planned-steps": self.planned_steps,
            "concurrency": self.concurrency,
            "fingerprint": json.dumps(dict(self.fingerprint), sort_keys=True),
            "name": self.name,
            "lora-rank": self.lora_rank,
            "lora-alpha": self.lora_alpha,
            "cut-layers": str(self.cuts or ""),
            "base-digests": json.dumps(dict(self.base_digests), sort_keys=True),
            "data-counts": json.dumps(dict(self.data_counts), sort_keys=True),
            "too-little-data": self.too_little,
            _PUBLIC_KEY: self.public_key.hex(),
        }
        values: dict[str, Value] = {keys.PREFIX + name: value for name, value in facts.items()}
        values[keys.PREFIX + _PACKS] = self.packs_arrays
        values[keys.PREFIX + _IGNORED] = list(self.ignored_keys)
        return RecordDict({keys.REPLY: stamped(values)})

    @classmethod
    def read(cls, message: Message) -> Self:
        """Read the reply of one node.

        Raises:
            FederationError: The reply is not what this version's ClientApp sends.
        """
        what = f"the handshake of node {message.metadata.src_node_id}"
        fields = Fields.of(message.content, what)

        def count(name: str) -> int:
            return fields.count(keys.PREFIX + name)

        def text(name: str) -> str:
            return fields.text(keys.PREFIX + name)

        try:
            return cls(
                partition_id=count("partition-id"),
                num_partitions=count("num-partitions"),
                num_examples=count("num-train-examples"),
                num_eval_examples=count("num-eval-examples"),
                planned_steps=count("planned-steps"),
                concurrency=count("concurrency"),
                fingerprint=_texts(text("fingerprint")),
                name=text("name"),
                lora_rank=count("lora-rank"),
                lora_alpha=fields.number(keys.PREFIX + "lora-alpha"),
                cuts=CutLayers.parse(text("cut-layers")) if text("cut-layers") else None,
                base_digests=_texts(text("base-digests")),
                data_counts=_counts(text("data-counts")),
                package_version=fields.text(keys.VERSION),
                too_little=text("too-little-data"),
                ignored_keys=fields.names(keys.PREFIX + _IGNORED),
                packs_arrays=fields.flag(keys.PREFIX + _PACKS),
                public_key=bytes.fromhex(fields.text(keys.PREFIX + _PUBLIC_KEY, "")),
            )
        except (ValueError, AttributeError, SplitError) as error:
            raise FederationError(
                f"{what} cannot be read ({error}). Run the same version of flower_split on every "
                "machine."
            ) from error


def _texts(text: str) -> dict[str, str]:
    """Return the strings of a JSON object."""
    return {str(name): str(value) for name, value in json.loads(text).items()}


def _counts(text: str) -> dict[str, int]:
    """Return the whole numbers of a JSON object."""
    return {str(name): int(value) for name, value in json.loads(text).items()}
