"""``flower-split trunk-revoke``: take one client out of the experiment that a trunk serves."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from flower_split.errors import ConfigError
from flower_split.runtime.exit_codes import COMPLETED
from flower_split.runtime.secret_files import read_secret
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate

_SECONDS = 10.0  # of one question


@dataclass(frozen=True, kw_only=True, slots=True)
class RevokeCommand:
    """What the command line asks for."""

    address: str  # host:port of the trunk
    token_file: Path
    root_certificates: str = ""  # PEM file of the CA for TLS
    certificate: ClientCertificate = NO_CERTIFICATE
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
    from flower_split.server.coordinator import TrunkCoordinator

    coordinator = TrunkCoordinator(
        command.address,
        read_secret(command.token_file, "--token-file"),
        root_certificates=command.root_certificates,
        timeout=_SECONDS,
        certificate=command.certificate,
    )
    with closing(coordinator):
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
