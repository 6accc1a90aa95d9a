"""Ask the clients for the initial values of the adapter that only base weights say.

Magnitudes of DoRA, biases and modules that train whole begin as the base weights say
(:mod:`flower_split.lora.initial_values`), and the ServerApp holds no base weights. In the handshake every
client gives the digest of each weight that such a value comes from; where all agree, one client gives
the values, and all begin with those.
"""

import logging
from collections.abc import Mapping

import torch
from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from torch import Tensor

from flower_split.errors import FederationError
from flower_split.lora.initial_values import digest_of, is_copy
from flower_split.messages.arrays import from_arrays
from flower_split.messages.client_facts import ClientFacts
from flower_split.messages.orders import BaseValuesOrder
from flower_split.messages.replies import BaseValuesReply
from flower_split.server.federation.exchange import by_partition, exchange
from flower_split.server.federation.nodes import Federation, describe

logger = logging.getLogger(__name__)


def gather_base_values(
    grid: Grid,
    federation: Federation,
    facts: Mapping[int, ClientFacts],
    shapes: Mapping[str, torch.Size],
    *,
    timeout: float,
) -> dict[str, Tensor]:
    """Ask for the base values, the lowest partition first, until every name has its value.

    Args:
        grid: Flower's grid.
        federation: The run's nodes.
        facts: What the clients said in the handshake, by partition.
        shapes: Names and shapes of the values.
        timeout: Seconds for one client's answer.

    Returns:
        The values, fp32 on the CPU.

    Raises:
        FederationError: Two clients hold other base weights; no client gave a value; or a value is
            not what the clients' digests say.
    """
    digests = agreed_digests(federation, facts)
    values: dict[str, Tensor] = {}
    problems: dict[int, str] = {}
    for partition_id in federation.partition_ids:
        names = sorted((shapes.keys() - values.keys()) & facts[partition_id].base_digests.keys())
        if not names:
            continue
        ask = Message(
            BaseValuesOrder(names=tuple(names)).write(),
            federation.nodes[partition_id],
            MessageType.QUERY,
            ttl=timeout + 60.0,
        )
        good, failed = by_partition(federation, [ask], exchange(grid, [ask], timeout=timeout))
        problems |= failed
        if partition_id in good:
            values |= _checked(good[partition_id], partition_id, names, digests)
            logger.info(
                "partition %d gave %d initial values of the adapter", partition_id, len(names)
            )
    missing = sorted(shapes.keys() - values.keys())
    if missing:
        why = f" {describe(problems, federation)}." if problems else ""
        raise FederationError(
            f"no client gave the initial value of {missing[0]} ({len(missing)} in all), which the "
            f"ServerApp does not know without base weights.{why} Use the same version and the same "
            "model files on every machine."
        )
    return values


def agreed_digests(federation: Federation, facts: Mapping[int, ClientFacts]) -> dict[str, str]:
    """Return the digest of every base value's weight, the same on all clients that hold it.

    Raises:
        FederationError: Two clients differ.
    """
    agreed: dict[str, tuple[str, int]] = {}
    for partition_id in federation.partition_ids:
        for name, digest in facts[partition_id].base_digests.items():
            known, first = agreed.setdefault(name, (digest, partition_id))
            if digest != known:
                raise FederationError(
                    f"partitions {first} (node {federation.nodes[first]}) and {partition_id} (node "
                    f"{federation.nodes[partition_id]}) hold other base weights: they differ in {name}. "
                    "Use the same model files on every machine."
                )
    return {name: digest for name, (digest, _) in agreed.items()}


def _checked(
    reply: Message, partition_id: int, names: list[str], digests: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the values of one reply that were asked for, checked.

    Raises:
        FederationError: One is missing, not finite, or not the weight that the digests are of.
    """
    found = from_arrays(BaseValuesReply.read(reply.content).values)
    for name in names:
        value = found.get(name)
        if value is None:
            fault = "is missing"
        elif not bool(torch.isfinite(value).all()):
            fault = "holds NaN or Inf"
        elif is_copy(name) and digest_of(value) != digests[name]:
            fault = "is not the weight whose digest it gave before"
        else:
            continue
        raise FederationError(
            f"partition {partition_id} was asked for the adapter's initial values, and {name} {fault}. "
            "Start the run again; if it stays, check that client's model files."
        )
    return {name: found[name] for name in names}
