"""Before round 1: wait for the nodes, ask each what it holds, and check that the job can run.

Every check ends the run at once with one paragraph that names the remedy; none waits for a barrier
to time out.
"""

import logging
import sys
import time
from collections.abc import Collection, Mapping, Sequence

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from flower_split.config import RunConfig, resolved_run_config, run_config_keys
from flower_split.errors import FederationError
from flower_split.messages.client_facts import ClientFacts
from flower_split.messages.orders import HandshakeOrder
from flower_split.parties.fingerprint import CUT_LAYERS, differing_fields
from flower_split.parties.parts import model_cuts
from flower_split.parties.protocol_versions import protocol_problem
from flower_split.runtime.simulation import pool_cap
from flower_split.runtime.version import __version__
from flower_split.server.federation.exchange import by_partition, exchange, lost_partitions
from flower_split.server.federation.nodes import Federation, describe_nodes
from flower_split.server.trunk_child import TrunkChild
from flower_split.split import CutLayers

logger = logging.getLogger(__name__)

_SETTLE_SECONDS = (
    2.0  # simulation registers all its nodes at once, shortly after the ServerApp starts
)
_NONE_SECONDS = 60.0  # simulation: until the first node must be there


def federation_config(num_clients: int) -> str:
    """Return the value of ``--federation-config`` with which ``num_clients`` clients run at once."""
    return (
        f"num-supernodes={num_clients} client-resources-num-cpus=1 init-args-num-cpus={num_clients}"
    )


def run_line(num_clients: int) -> str:
    """Return the command line with which a simulation of ``num_clients`` clients can run."""
    return f"flwr run APP --stream --federation-config '{federation_config(num_clients)}'"


class SimulatedGrid(Grid):
    """A grid whose nodes are all of this machine, and all there from the beginning.

    Attributes:
        trunk: A process that waits to become the run's trunk; None: there is none.
    """

    trunk: TrunkChild | None = None


def is_simulation(grid: Grid) -> bool:
    """Return whether all nodes are simulated on this machine, by Flower or by a local run."""
    if isinstance(grid, SimulatedGrid):
        return True
    # Flower's simulation has loaded its grid; nobody else need spend the seconds that this takes.
    if "flwr.superlink.grid.inmemory_grid" not in sys.modules:
        return False
    from flwr.superlink.grid import InMemoryGrid

    return isinstance(grid, InMemoryGrid)


def num_participants(num_nodes: int, fraction: float) -> int:
    """Return how many of ``num_nodes`` clients take part; at least one for a fraction above 0."""
    return 0 if fraction == 0 else max(1, int(num_nodes * fraction + 1e-9))


def wait_for_nodes(grid: Grid, config: RunConfig) -> list[int]:
    """Wait until ``num-clients`` nodes are connected.

    Returns:
        The ids of all connected nodes, ascending: ``num-clients`` or more.

    Raises:
        FederationError: Too few nodes: at once in a simulation, whose size is fixed when it starts;
            after ``join-timeout`` otherwise.
    """
    wanted, simulated = config.num_clients, is_simulation(grid)
    start = time.monotonic()
    settled = 0.3 if simulated and not isinstance(grid, SimulatedGrid) else 0.0
    deadline = start + (
        min(_NONE_SECONDS, config.join_timeout) if simulated else config.join_timeout
    )
    nodes: list[int] = []
    changed = start
    while True:
        before, nodes = nodes, sorted(grid.get_node_ids())
        now = time.monotonic()
        changed = now if nodes != before else changed
        if len(nodes) >= wanted and now - changed >= settled:
            return nodes
        if (simulated and nodes and now - changed >= _SETTLE_SECONDS) or now >= deadline:
            break
        if not simulated and nodes != before:
            logger.info("%d of %d SuperNodes are connected", len(nodes), wanted)
        time.sleep(0.1 if simulated else 0.5)
    if simulated:
        raise FederationError(
            f"num-clients is {wanted}, but this simulation has {len(nodes)} SuperNodes. "
            f"Start it with: {run_line(wanted)}"
        )
    raise FederationError(
        f"num-clients is {wanted}, but only {len(nodes)} SuperNodes were connected after "
        f"{config.join_timeout:g} s (join-timeout). Start the missing ones with: flower-supernode "
        f"--superlink HOST:PORT --node-config 'partition-id=… num-partitions={wanted}', or lower "
        "num-clients."
    )


def shake_hands(
    grid: Grid, nodes: Sequence[int], config: RunConfig, trunk_fingerprint: Mapping[str, str]
) -> tuple[Federation, dict[int, ClientFacts]]:
    """Ask every node what it holds and check the answers. Lost clients are asked again.

    Returns:
        ``(federation, facts by partition)``.

    Raises:
        FederationError: A node failed, or the answers do not allow the run; see :func:`check_facts`.
    """
    # No partitions are known yet: number the nodes in the order of their ids to name them in errors.
    unnamed = Federation(dict(enumerate(sorted(nodes))))
    good: dict[int, Message] = {}
    ask, left = list(nodes), config.round_retries
    while ask:
        messages = [
            Message(
                HandshakeOrder().write(),
                node,
                MessageType.QUERY,
                ttl=config.round_timeout + 60.0,
            )
            for node in ask
        ]
        replies = exchange(grid, messages, timeout=config.round_timeout)
        answered, problems = by_partition(unnamed, messages, replies)
        good |= answered
        lost = lost_partitions(unnamed, messages, replies)
        if problems and (left == 0 or lost != set(problems) or len(replies) < len(messages)):
            raise FederationError(
                f"{len(problems)} of {len(nodes)} clients cannot start. "
                f"{describe_nodes(problems, unnamed)}"
            )
        ask, left = [unnamed.nodes[partition_id] for partition_id in problems], left - 1
    answers = [(unnamed.nodes[index], ClientFacts.read(m)) for index, m in sorted(good.items())]
    federation = check_facts(answers, config, trunk_fingerprint)
    facts = {answer.partition_id: answer for _, answer in answers}
    return federation, {
        partition_id: facts[partition_id] for partition_id in federation.partition_ids
    }


def check_facts(
    answers: Sequence[tuple[int, ClientFacts]],
    config: RunConfig,
    trunk_fingerprint: Mapping[str, str],
) -> Federation:
    """Check what the clients said, ``(node id, facts)`` each, and return who holds what.

    Raises:
        FederationError: Two nodes hold one partition; a partition is out of range; a client has no
            data; a fingerprint differs; or too few clients run at once for the window mode.
    """
    nodes: dict[int, int] = {}
    left_out = {facts.partition_id: facts.too_little for _, facts in answers if facts.too_little}
    answers = [answer for answer in answers if not answer[1].too_little]
    if left_out and not answers:
        raise FederationError(
            f"all {len(left_out)} clients have too little data (data.on-small-client). Partition "
            f"{min(left_out)}: {left_out[min(left_out)]}"
        )
    for node, facts in sorted(answers, key=lambda answer: answer[1].partition_id):
        _check_partition(facts, node, nodes, len(answers))
        _check_data(facts, node, config)
        nodes[facts.partition_id] = node
        _check_ignored_keys(facts, node, config)
        _check_cuts(facts, node, config, trunk_fingerprint)
        _check_fingerprint(facts, node, trunk_fingerprint)
    _check_named_partitions({**nodes, **left_out}, config)
    _check_concurrency([facts for _, facts in answers], config)
    return Federation(nodes, left_out)


def _check_partition(
    facts: ClientFacts, node: int, nodes: Mapping[int, int], num_nodes: int
) -> None:
    """Check that a client's partition exists, and that no other node in ``nodes`` holds it."""
    partition_id = facts.partition_id
    if partition_id in nodes:
        raise FederationError(
            f"nodes {nodes[partition_id]} and {node} both hold partition {partition_id}. Give every "
            "SuperNode its own: flower-supernode … --node-config 'partition-id=… "
            f"num-partitions={num_nodes}'."
        )
    if not 0 <= partition_id < facts.num_partitions:
        raise FederationError(
            f"node {node} holds partition {partition_id} of {facts.num_partitions}; partition-id must "
            "be at least 0 and below num-partitions. Restart that SuperNode with "
            "--node-config 'partition-id=… num-partitions=…'."
        )


def _check_data(facts: ClientFacts, node: int, config: RunConfig) -> None:
    """Check that a client has examples to train and to evaluate on, and steps to take."""
    partition_id = facts.partition_id
    for count, what in (
        (facts.num_examples, "training"),
        (facts.num_eval_examples, "held-out"),
    ):
        if count < 1:
            raise FederationError(
                f"partition {partition_id} (node {node}) has no {what} examples. Give it more data "
                "(data.path, data.dataset), use fewer partitions, or change "
                f"data.eval-fraction, which is {config.data.eval_fraction:g}."
            )
    if facts.planned_steps < 1:
        raise FederationError(
            f"partition {partition_id} (node {node}) plans no optimizer step. Raise train.local-steps "
            "or train.local-epochs."
        )


def _check_ignored_keys(facts: ClientFacts, node: int, config: RunConfig) -> None:
    """Check that what an older client left out of the run config is at its default."""
    values, defaults = resolved_run_config(config), run_config_keys()
    changed = [key for key in facts.ignored_keys if values.get(key) != defaults.get(key)]
    if changed:
        named = ", ".join(
            f"{key} (here {values.get(key)!r}, by default {defaults.get(key)!r})" for key in changed
        )
        raise FederationError(
            f"partition {facts.partition_id} (node {node}) has flower-split {facts.package_version}, "
            f"which does not know {named}. Upgrade it there (this is {__version__}), or leave those "
            "keys at their defaults."
        )


def _check_fingerprint(facts: ClientFacts, node: int, trunk_fingerprint: Mapping[str, str]) -> None:
    """Check that a client and the trunk hold parts of the same model and configuration."""
    client = f"partition {facts.partition_id} (node {node}, flower-split {facts.package_version})"
    if problem := protocol_problem(
        facts.fingerprint, trunk_fingerprint, (client, "the run's trunk")
    ):
        raise FederationError(problem)
    differing = differing_fields(
        facts.fingerprint, trunk_fingerprint, own_cuts=facts.cuts is not None
    )
    if differing:
        pairs = ", ".join(
            f"{name}: client {facts.fingerprint.get(name)!r}, trunk {trunk_fingerprint.get(name)!r}"
            for name in differing
        )
        raise FederationError(
            f"{client} and the trunk do not hold parts of the same model and configuration; they differ "
            f"in {pairs}. Start the trunk with the run's own configuration: flower-split trunk APP "
            "--run-config '…', and use the same model files on every machine."
        )


def _check_named_partitions(partitions: Collection[int], config: RunConfig) -> None:
    """Check that the run config names only partitions that a client holds."""
    for key, named in (
        ("model.cuts-by-partition", config.model.own_cuts),
        ("lora.rank-by-partition", config.lora.ranks_by_partition),
    ):
        strangers = sorted(named.keys() - set(partitions))
        if strangers:
            raise FederationError(
                f"{key} names partition {', '.join(map(str, strangers))}, which no client holds; "
                f"the partitions are {', '.join(map(str, sorted(partitions)))}. Leave it out."
            )


def _check_cuts(
    facts: ClientFacts, node: int, config: RunConfig, trunk_fingerprint: Mapping[str, str]
) -> None:
    """Refuse a client whose cut layers do not lie within the span of the trunk that is there."""
    if facts.cuts is None:
        return
    text = trunk_fingerprint.get(CUT_LAYERS)
    span = CutLayers.parse(text) if text else model_cuts(config)
    if not span.holds(facts.cuts):
        raise FederationError(
            f"partition {facts.partition_id} (node {node}) is cut at {facts.cuts}, and the trunk holds "
            f"layers {span.first} to {span.second - 1} (cut layers {span}), so the layers between are "
            "not all there. Give the client more layers (--node-config 'first-cut=… second-cut=…', "
            "model.cuts-by-partition), or start the trunk with a wider span (model.first-cut, "
            "model.second-cut)."
        )


def _check_concurrency(answers: Sequence[ClientFacts], config: RunConfig) -> None:
    known = [facts.concurrency for facts in answers if facts.concurrency > 0]
    if not known or not needs_all_at_once(config):
        return
    wanted, possible = num_participants(len(answers), config.fraction_train), min(known)
    if possible >= wanted:
        return
    remedy = f"Start it with: {run_line(len(answers))}"
    if wanted > pool_cap():
        remedy = (
            f"This machine runs at most {pool_cap()} at once. Use trunk.step-every = "
            '"server-round", which needs no barrier, a smaller fraction-train, or more CPU cores'
        )
    raise FederationError(
        f'trunk.step-every = "local-step" needs all {wanted} clients of a round running at once, '
        f"but this simulation runs {possible} at once. {remedy}."
    )


def needs_all_at_once(config: RunConfig) -> bool:
    """Return whether the trunk steps only when every participant of the round has contributed."""
    return config.mode == "joint" and config.trunk.step_every == "local-step"


def describe_clients(facts: Mapping[int, ClientFacts], federation: Federation) -> str:
    """Return one line for the log: which clients are there, with how many examples."""
    counts = ", ".join(
        f"{partition_id} {item.name}".rstrip() + f": {item.num_examples}"
        for partition_id, item in facts.items()
    )
    return f"{len(federation.nodes)} clients; training examples by partition: {counts}"
