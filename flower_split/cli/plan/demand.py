"""What a run or a baseline asks of a client and of the trunk: memory and arithmetic, for a sweep."""

from dataclasses import replace

from flower_split.cli.plan.command import client_memory, trunk_memory
from flower_split.cli.plan.dry_run import CLIENT, TRUNK, dry_run
from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.experiments.baselines import BASELINES
from flower_split.experiments.results import Demand


def demand_of(config: RunConfig, baseline: str) -> Demand | None:
    """Return what one client and the trunk need; None where ``flower-split plan`` cannot tell.

    One micro-batch is run on fake tensors, and its operations are counted by torch's own formulas. A
    baseline with the whole model on the client has no trunk; one in turns has one client at a time.

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
    at_once = None if made is None else 1  # the others wait for their turn
    return Demand(
        client_bytes=client_memory(config, run).total,
        client_flops=count * run.parts[CLIENT].flops,
        trunk_bytes=0 if whole else trunk_memory(config, run, at_once).total,
        trunk_flops=count * run.parts[TRUNK].flops,
    )
