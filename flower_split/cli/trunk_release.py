"""``flower-split trunk-release``: free a trunk from a run that has gone."""

from dataclasses import dataclass

from flower_split.cli.trunk_login import TrunkLogin
from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import TrunkStatus
from flower_split.runtime.exit_codes import COMPLETED
from flower_split.server.coordinator import TrunkCoordinator

_OVER = ("idle", "aborted")
_ALIVE = 60.0  # seconds since a client's call within which a round counts as at work


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseCommand:
    """What the command line asks for."""

    trunk: TrunkLogin
    force: bool = False  # also from a round whose clients are at work


def release(command: ReleaseCommand) -> int:
    """Give up the trunk's open round, so that another run may begin.

    What is committed stays. The round's clients are told at their next call.

    Raises:
        TrunkError: The trunk does not answer, or refuses the token.
        TrunkRefused: The round's clients are at work, and ``force`` is not given.
    """
    with command.trunk.coordinator() as coordinator:
        status = coordinator.status()
        if status.max_experiments > 1:
            return _release_place(coordinator, status, command)
        if status.phase in _OVER:
            print(f"the trunk {command.trunk.address} is free: no round is open")
            return COMPLETED
        _check_left(status, command)
        coordinator.abort_round(
            status.experiment,
            status.server_round,
            status.attempt,
            "an operator released the trunk (flower-split trunk-release)",
        )
    print(
        f"the trunk {command.trunk.address} is free: round {status.server_round} of experiment "
        f"{status.experiment} was given up; its committed rounds stay, and its run can be resumed"
    )
    return COMPLETED


def _release_place(
    coordinator: TrunkCoordinator, status: TrunkStatus, command: ReleaseCommand
) -> int:
    """Let one of several experiments go, with its open round."""
    name, known = command.trunk.experiment, {item.name for item in status.experiments}
    if name not in known:
        what = f"experiment {name} is not there" if name else "name one of its experiments"
        raise TrunkRefused(
            RefusalReason.INVALID_REQUEST,
            f"the trunk {command.trunk.address} serves several experiments, and {what}: --experiment "
            f"NAME, of {', '.join(sorted(known)) or 'none that are there now'}.",
        )
    if status.phase not in _OVER:
        _check_left(status, command)
    coordinator.end_experiment()
    print(
        f"the trunk {command.trunk.address} has let experiment {name} go; its committed rounds stay, and "
        f"its run can be resumed ({len(known) - 1} of {status.max_experiments} places are taken)"
    )
    return COMPLETED


def _check_left(status: TrunkStatus, command: ReleaseCommand) -> None:
    """Check that the round's clients have gone, unless that is no matter.

    Raises:
        TrunkRefused: One called a moment ago.
    """
    calls = [slot.silent_seconds for slot in status.slots if slot.joined]
    if not command.force and calls and min(calls) < _ALIVE:
        raise TrunkRefused(
            RefusalReason.INVALID_REQUEST,
            f"the trunk {command.trunk.address} is at work: a client of round {status.server_round} of "
            f"experiment {status.experiment} called {min(calls):.0f} s ago. Wait for that run, stop it "
            "(flwr stop), or give its round up with --force; a run that is alive begins it again.",
        )
