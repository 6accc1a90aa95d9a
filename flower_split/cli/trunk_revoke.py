"""``flower-split trunk-revoke``: take one client out of the experiment that a trunk serves."""

from dataclasses import dataclass

from flower_split.cli.trunk_login import TrunkLogin
from flower_split.errors import ConfigError
from flower_split.runtime.exit_codes import COMPLETED


@dataclass(frozen=True, kw_only=True, slots=True)
class RevokeCommand:
    """What the command line asks for."""

    trunk: TrunkLogin
    slot: int | None = None  # the client's data partition; None: by subject
    subject: str = ""  # a name in its certificate

    def __post_init__(self) -> None:
        """Check the values."""
        if self.slot is not None and self.slot < 0:
            raise ConfigError(f"--slot must be a partition, from 0; it is {self.slot}.")


def revoke(command: RevokeCommand) -> int:
    """Revoke a client, and say what became of the round.

    Raises:
        TrunkError: The trunk does not answer, or refuses the token.
        TrunkRefused: It has no such client.
    """
    with command.trunk.coordinator() as coordinator:
        slots = coordinator.revoke_client(
            [] if command.slot is None else [command.slot], command.subject
        )
        status = coordinator.status()
    named = ", ".join(map(str, slots))
    print(
        f"slot {named} is out of experiment {status.experiment}; its token is unknown from now on"
    )
    if status.phase == "aborted":
        print(f"round {status.server_round} was given up: {status.problem}")
    else:
        print(f"round {status.server_round} goes on without it ({status.phase})")
    return COMPLETED
