"""The trunk that an app's configuration names: it answers, is free, and holds the same model."""

import os
from contextlib import closing

from flower_split.cli.doctor.findings import Finding, ok, problem, warning
from flower_split.config import RunConfig
from flower_split.errors import FlowerSplitError, TrunkRefused
from flower_split.protocol.values import TrunkStatus

_SECONDS = 10.0
_AT_WORK = ("joining", "open", "done", "prepared")  # not committed, and not given up


def trunk(config: RunConfig) -> list[Finding]:
    """Ask the trunk where it stands, with the token that the configuration names."""
    from flower_split.parties.fingerprint import fingerprint
    from flower_split.server.coordinator import TrunkCoordinator
    from flower_split.server.trunk_connection import coordinator_token
    from flower_split.wire.client_certificate import ClientCertificate

    subject = f"trunk {config.trunk.address}"
    try:
        coordinator = TrunkCoordinator(
            config.trunk.address,
            coordinator_token(config.trunk.token_file, os.environ),
            root_certificates=config.trunk.root_certificates,
            timeout=_SECONDS,
            certificate=ClientCertificate.of(config.trunk),
            proxy=config.trunk.proxy,
        )
        with closing(coordinator):
            status = coordinator.status()
        mine = fingerprint(config)
    except TrunkRefused as error:
        return [problem(subject, str(error), "Copy the trunk's token file here again.")]
    except FlowerSplitError as error:
        remedy = (
            "Look whether it runs there, whether its name and port are right, and whether a firewall is "
            "in between."
        )
        return [problem(subject, str(error), remedy)]
    return described(subject, status, mine)


def described(subject: str, status: TrunkStatus, mine: dict[str, str]) -> list[Finding]:
    """Return what a trunk's answer means for a run of this configuration.

    Args:
        subject: Names the trunk.
        status: Its answer.
        mine: The configuration's fingerprint.
    """
    from flower_split.parties.experiment_settings import experiment_fields
    from flower_split.parties.fingerprint import differing_fields

    found = [ok(subject, "answers to the token")]
    own = experiment_fields(mine, status.fingerprint) if status.max_experiments > 1 else frozenset()
    if fields := [name for name in differing_fields(mine, status.fingerprint) if name not in own]:
        theirs = ", ".join(
            f"{name} ({mine.get(name, 'nothing')} here, {status.fingerprint.get(name, 'nothing')} there)"
            for name in fields
        )
        remedy = "Start the trunk with the same app and --run-config, or correct this one."
        found.append(problem(subject, f"it differs in {theirs}", remedy))
    if own and len(status.experiments) >= status.max_experiments:
        found.append(
            warning(
                subject,
                f"all of its {status.max_experiments} places for experiments are taken",
                "A run that begins now is refused. Wait for one to end; flower-split status lists them.",
            )
        )
    elif status.phase in _AT_WORK:
        found.append(
            warning(
                subject,
                f"it is at work on experiment {status.experiment}, round {status.server_round}",
                "A run that begins now is refused. Wait for that one to end; or, if it has gone, free the "
                "trunk: flower-split trunk-release.",
            )
        )
    return found
