"""What a run or a baseline asks of a client and of the trunk: memory and arithmetic, for a sweep."""

from dataclasses import replace

from flower_split.cli.plan.command import client_memory, moments_bytes, trunk_memory
from flower_split.cli.plan.dry_run import CLIENT, TRUNK, DryRun, dry_run
from flower_split.cli.plan.wire_bytes import experiment_name, step_bytes
from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.experiments.baselines import BASELINES
from flower_split.experiments.results import Demand
from flower_split.server.federation.handshake import num_participants


def demand_of(config: RunConfig, baseline: str) -> Demand | None:
    """Return what one client and the trunk need; None where ``flower-split plan`` cannot tell.

    One micro-batch is run on fake tensors, and its operations are counted by torch's own formulas. A
    baseline with the whole model on the client has no trunk; one in turns has one client at a time; one
    with a copy of the trunk for each client has what trains and its optimizer once for each.

    Args:
        config: The run's.
        baseline: A key of ``BASELINES``; empty: the run itself.

    Raises:
        SplitError: The model's configuration cannot be read, or the cut layers do not fit.
    """
    made = BASELINES.get(baseline)
    whole = made is not None and made.whole_model
    try:
        run = dry_run(config, whole=whole)
    except ConfigError:
        return None
    count = config.train.gradient_accumulation_steps
    if made is not None and made.all_in_a_step:
        count *= config.num_clients
    if whole:  # nothing is on a wire
        config = replace(config, train=replace(config.train, micro_batches_in_flight=1))
    at_once = 1 if made is not None and made.in_turns else None  # the others wait for their turn
    trunk = 0 if whole else trunk_memory(config, run, at_once).total
    if made is not None and made.trunk_copies:
        part = run.parts[TRUNK]
        copy = part.trained_bytes + moments_bytes(part, config.trunk.optimizer)
        trunk += (config.num_clients - 1) * copy
    return Demand(
        client_bytes=client_memory(config, run).total,
        client_flops=count * run.parts[CLIENT].flops,
        trunk_bytes=trunk,
        trunk_flops=count * run.parts[TRUNK].flops,
        wire_bytes=0 if whole else _wire_bytes(config, run),
    )


def _wire_bytes(config: RunConfig, run: DryRun) -> int:
    """Return the bytes of all clients' calls in the whole run; 0 where steps are counted in epochs."""
    step = step_bytes(config, run, experiment_name(config))
    steps = config.train.local_steps * config.num_server_rounds
    clients = num_participants(config.num_clients, config.fraction_train)
    return clients * steps * (step.sent + step.received)
