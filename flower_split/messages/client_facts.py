"""What a client tells the ServerApp, and the names of the records in its replies."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message

from flower_split.errors import FederationError, SplitError
from flower_split.split import CutLayers

HANDSHAKE = "handshake"
"""The ConfigRecord of the reply to the handshake."""

BASE_VALUES = "base-values"
"""A query's purpose, and the ArrayRecord of its reply: what of the adapter begins as the base says."""

STEPS = "steps"
"""The ConfigRecord of per-step lists in a training reply; stripped before the inner strategy."""

BASE_CHANGE = "base-change"
"""A second ArrayRecord in a message: what the method adds to the client's frozen base weights."""

PRIVATE = "private"
"""Key in a message's ConfigRecord: names of the weights that stay with the client; absent: none.
Also the ConfigRecord of a training reply with the digest of the values they have got."""

PRIVATE_DIGEST = "private-digest"
"""Digest of a client's private weights after its last committed round; empty: it has none yet."""

PRIVATE_FOLDER = "private-folder"
"""Where a simulated client keeps its private weights unless it is told otherwise."""

TURN = "turn"
"""Key in a training message's ConfigRecord: which part of its data the client takes, as the how-manyth
of its trainings it is, from 1; absent: the server round."""

WEIGHT_NORMS = "weight-norms"
"""Key in a training message's ConfigRecord: the reply shall hold the norms of DoRA's weights, in a
ConfigRecord of this name: module name to fp32 bytes."""

TRAINABLE = "trainable"
"""Key in a training message's ConfigRecord: names of the weights that train; absent: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientFacts:
    """What one client says of itself in the handshake."""

    partition_id: int  # its data partition: its slot on the trunk
    num_partitions: int  # as its node configuration says
    num_examples: int  # training examples
    num_eval_examples: int  # held-out examples
    planned_steps: int  # optimizer steps it will take in a round
    concurrency: int  # how many clients its simulation runs at once; 0: not a simulation
    fingerprint: Mapping[str, str]
    name: str = ""  # what its data is about, where the source says so
    lora_rank: int = 0  # its own, see flower_split.parties.client_ranks; 0: the run's
    lora_alpha: float = 0.0  # its own; 0: by the run's rule
    cuts: CutLayers | None = None  # where its model is cut; None: where the run says
    base_digests: Mapping[str, str] = field(default_factory=dict)  # of its base values' weights

    def to_record(self) -> ConfigRecord:
        """The record that travels."""
        return ConfigRecord(
            {
                "partition-id": self.partition_id,
                "num-partitions": self.num_partitions,
                "num-examples": self.num_examples,
                "num-eval-examples": self.num_eval_examples,
                "planned-steps": self.planned_steps,
                "concurrency": self.concurrency,
                "fingerprint": json.dumps(dict(self.fingerprint), sort_keys=True),
                "name": self.name,
                "lora-rank": self.lora_rank,
                "lora-alpha": self.lora_alpha,
                "cut-layers": str(self.cuts or ""),
                "base-digests": json.dumps(dict(self.base_digests), sort_keys=True),
            }
        )

    @classmethod
    def from_message(cls, message: Message) -> "ClientFacts":
        """Read the reply of one node.

        Raises:
            FederationError: The reply is not what this version's ClientApp sends.
        """
        try:
            record = message.content.config_records[HANDSHAKE]

            def count(key: str) -> int:
                value = record[key]
                if isinstance(value, bool) or not isinstance(value, int):
                    raise ValueError(f"{key} must be an integer; it is {value!r}")
                return value

            fingerprint = json.loads(str(record["fingerprint"]))
            return cls(
                partition_id=count("partition-id"),
                num_partitions=count("num-partitions"),
                num_examples=count("num-examples"),
                num_eval_examples=count("num-eval-examples"),
                planned_steps=count("planned-steps"),
                concurrency=count("concurrency"),
                fingerprint={str(name): str(value) for name, value in fingerprint.items()},
                name=str(record["name"]),
                lora_rank=count("lora-rank"),
                lora_alpha=float(str(record["lora-alpha"])),
                cuts=CutLayers.parse(str(record["cut-layers"])) if record["cut-layers"] else None,
                base_digests={
                    str(name): str(digest)
                    for name, digest in json.loads(str(record["base-digests"])).items()
                },
            )
        except (KeyError, ValueError, AttributeError, SplitError) as error:
            raise FederationError(
                f"the handshake of node {message.metadata.src_node_id} cannot be read ({error}). "
                "Run the same version of flower_split on every machine."
            ) from error
