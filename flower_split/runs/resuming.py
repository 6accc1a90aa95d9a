"""Resuming a run: which settings may change, and which configuration it goes on with.

A resumed run goes on with the configuration in its own ``config.json``. Only the keys of
:data:`MAY_CHANGE` may differ: none of them changes what was computed so far.
"""

from collections.abc import Mapping

from flower_split.config import RunConfig, Scalar, parse_run_config, resolved_run_config
from flower_split.errors import RunDirectoryError

ROUNDS = "num-server-rounds"

MAY_CHANGE: Mapping[str, str] = {
    ROUNDS: 'larger than before, where both schedules are "constant"',
    "resume": "the run directory itself",
    "resume-previous": "go on from the committed round before the last",
    "run-dir": "ignored; the run stays where it is",
    "join-timeout": "seconds to wait for the nodes",
    "round-timeout": "seconds of one phase",
    "round-retries": "how often a lost round is tried again",
    "early-stopping.metric": "what to look at, from the round that the run goes on after",
    "early-stopping.goal": "whether smaller or larger is better",
    "early-stopping.patience": "measurements",
    "early-stopping.min-delta": "in the metric's unit",
    "report": "what is written when the run is finished",
    "train.report-to": "where metrics are told",
    "train.client-worker": "who answers a node's messages",
    "train.client-dir": "where the clients' own files are now",
    "trunk.address": "where the trunk serves now",
    "trunk.token-file": "its token",
    "trunk.root-certificates": "its CA",
    "trunk.client-certificate": "what is shown to it",
    "trunk.client-key": "of that certificate",
    "trunk.join-timeout": "seconds",
    "trunk.window-timeout": "seconds",
    "trunk.call-timeout": "seconds",
}
"""Run-config key -> what may change about it when a run is resumed."""


def resumed_config(before: RunConfig, given: Mapping[str, Scalar]) -> RunConfig:
    """Return the configuration that a resumed run goes on with: its own, with ``given`` on top.

    Args:
        before: The run's configuration, from its directory.
        given: Keys to change; ``resume`` is among them.

    Raises:
        ConfigError: A key or a value is wrong.
        RunDirectoryError: A key may not change.
    """
    config = parse_run_config({**resolved_run_config(before), **given})
    check_may_change(before, config)
    return config


def check_may_change(before: RunConfig, config: RunConfig) -> None:
    """Check that a run may go on with ``config``.

    Raises:
        RunDirectoryError: A key differs that may not; all of them are named.
    """
    old, new = resolved_run_config(before), resolved_run_config(config)
    differing = [
        f"{key} = {new.get(key)!r}, was {old.get(key)!r}"
        for key in {**old, **new}  # the app's own may be in one of them alone
        if new.get(key) != old.get(key) and key not in MAY_CHANGE
    ]
    if differing:
        raise RunDirectoryError(
            f"a resumed run keeps its configuration, but these keys differ: {'; '.join(differing)}. "
            "Leave them out (flower-split run --resume takes the run's own configuration), or "
            f"begin a new run. A resumed run may change: {', '.join(MAY_CHANGE)}."
        )
    if config.num_server_rounds != before.num_server_rounds:
        _check_rounds(before, config.num_server_rounds)


def _check_rounds(before: RunConfig, rounds: int) -> None:
    if rounds < before.num_server_rounds:
        raise RunDirectoryError(
            f"a resumed run may get more rounds, not fewer; {ROUNDS} = {rounds}, was "
            f"{before.num_server_rounds}. Leave the key out."
        )
    for key, schedule in (
        ("train.optimizer.schedule", before.train.optimizer.schedule),
        ("trunk.optimizer.schedule", before.trunk.optimizer.schedule),
    ):
        if schedule != "constant":
            raise RunDirectoryError(
                f"{ROUNDS} = {rounds}, was {before.num_server_rounds}: a run may be extended where "
                f'both learning-rate schedules are "constant"; {key} = "{schedule}" spreads the '
                "rates over all rounds, so that the rounds done would have had other ones. Begin a "
                "new run."
            )


def resume_table() -> str:
    """Return :data:`MAY_CHANGE` as lines for ``--help``."""
    width = max(map(len, MAY_CHANGE))
    return "\n".join(f"  {key:<{width}}  {what}" for key, what in MAY_CHANGE.items())
