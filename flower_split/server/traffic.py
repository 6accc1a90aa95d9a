"""Bytes of a run by kind and client: trunk calls as the clients count them, messages as they pass here.

A message counts with the bytes of its records; Flower's own envelope is left out.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from flower_split.server.wrapped_grid import WrappedGrid

KINDS = ("activations", "gradients", "evaluation", "adapters", "baseline")
_KIND_OF_MESSAGE = {"train": "adapters", "evaluate": "evaluation"}  # by the type before a dot
_BASELINE = "local_only"  # the type after the dot


class Traffic:
    """Counts since the last :meth:`take`, by client and by kind and direction."""

    def __init__(self) -> None:
        self._counts: defaultdict[int, Counter[str]] = defaultdict(Counter)

    def add(self, client: int, kind: str, *, up: float = 0, down: float = 0) -> None:
        """Count bytes that a client sent (``up``) and received (``down``).

        Args:
            client: Its partition.
            kind: One of :data:`KINDS`.
            up: Bytes from the client.
            down: Bytes to the client.
        """
        self._counts[client][f"{kind}_up"] += int(up)
        self._counts[client][f"{kind}_down"] += int(down)

    def take(self) -> dict[int, dict[str, int]]:
        """Return the counts by client, without zeros, and begin anew."""
        taken = {
            client: {name: count for name, count in counts.items() if count}
            for client, counts in sorted(self._counts.items())
        }
        self._counts.clear()
        return {client: counts for client, counts in taken.items() if counts}


class MeteredGrid(WrappedGrid):
    """A grid that counts what passes through it, but for ``send_and_receive``.

    Args:
        grid: Flower's.
        traffic: Where it is counted, by partition.
        nodes: Partition -> node id; other nodes are not counted.
    """

    def __init__(self, grid: Grid, traffic: Traffic, nodes: Mapping[int, int]) -> None:
        super().__init__(grid)
        self._traffic = traffic
        self._partitions = {node: partition_id for partition_id, node in nodes.items()}
        self._asked: dict[str, tuple[int, str]] = {}  # message id -> partition, kind

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, and count them for their clients."""
        sent = list(messages)
        ids = list(self._grid.push_messages(sent))
        for identity, message in zip(ids, sent, strict=True):
            kind = kind_of(message.metadata.message_type)
            partition_id = self._partitions.get(message.metadata.dst_node_id)
            if identity and kind and partition_id is not None:
                self._asked[identity] = partition_id, kind
                self._traffic.add(partition_id, kind, down=content_bytes(message.content))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch replies, and count them for the clients that were asked."""
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            asked = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None and reply.has_content():
                self._traffic.add(asked[0], asked[1], up=content_bytes(reply.content))
        return replies


def kind_of(message_type: str) -> str:
    """Return the kind of a message's bytes; empty for a handshake or another question."""
    name, _, detail = message_type.partition(".")
    return "baseline" if detail == _BASELINE else _KIND_OF_MESSAGE.get(name, "")


def content_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's tensors, metrics and binary values.

    Flower's own count refuses a config record with an empty text, so texts and flags are left out.
    """
    arrays = sum(record.count_bytes() for record in content.array_records.values())
    metrics = sum(record.count_bytes() for record in content.metric_records.values())
    values = [v for record in content.config_records.values() for v in record.values()]
    return arrays + metrics + sum(len(value) for value in values if isinstance(value, bytes))


def trunk_calls(
    lists: Mapping[str, Iterable[float]],
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return a training reply's bytes as ``((activations up, down), (gradients up, down))``."""
    total = [sum(lists.get(name, ())) for name in ("bytes_sent", "bytes_received")]
    gradients = [
        sum(lists.get(name, ())) for name in ("gradient_bytes_sent", "gradient_bytes_received")
    ]
    activations = (total[0] - gradients[0], total[1] - gradients[1])
    return activations, (gradients[0], gradients[1])
