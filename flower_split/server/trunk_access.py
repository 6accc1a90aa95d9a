"""How the ServerApp and its clients reach the trunk: address, round control, health of its process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flower_split.protocol.values import Arrival, RoundPlan, RoundReport, TrunkStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkAccess:
    """How clients reach the trunk."""

    address: str  # host:port as the clients see it
    root_certificates: str = ""  # PEM text of the CA for TLS; empty: plain text on loopback


def _always() -> bool:
    return True


def _nothing() -> None:
    pass


def _nobody(missing: Mapping[int, int]) -> None:
    pass


@dataclass(frozen=True, slots=True)
class TrunkHealth:
    """How the round loops watch the trunk's process, and wait for it and for lost clients."""

    is_running: Callable[[], bool] = _always
    """Return whether the process that this app started runs or is being restarted; True where
    somebody else runs the trunk."""
    ensure_running: Callable[[], None] = _nothing
    """Wait until the trunk serves again.

    Raises:
        TrunkUnavailable: It does not within its deadline.
    """
    await_clients: Callable[[Mapping[int, int]], None] = _nobody
    """Wait until clients answer that a lost round has not heard of; given their nodes by partition.

    Raises:
        FederationError: One does not within the deadline.
    """


class Coordinator(Protocol):
    """Round control of a trunk; :class:`flower_split.server.coordinator.TrunkCoordinator` by gRPC.

    :class:`~flower_split.server.trunk_rounds.TrunkRounds` calls it, from one thread. Every call may
    be repeated: the trunk recognises a round by experiment, number and attempt. Every call raises
    :class:`~flower_split.errors.TrunkUnavailable` where there is no answer in time and
    :class:`~flower_split.errors.TrunkRefused` with the trunk's reason.
    """

    def begin_round(self, plan: RoundPlan) -> tuple[int, int]:
        """Open a round for its participants; return ``(epoch, version)`` of the trunk."""

    def prepare_round(
        self,
        experiment: str,
        server_round: int,
        attempt: int,
        arrivals: Sequence[Arrival] = (),
    ) -> RoundReport:
        """Close the round to contributions and return who completed what (commit's first phase).

        Args:
            experiment: Experiment of the round.
            server_round: Number of the round.
            attempt: Attempt at the round.
            arrivals: The arrivals of an asynchronous round: whose work makes its step.
        """

    def commit_round(self, experiment: str, server_round: int, attempt: int) -> int:
        """Keep the prepared round's steps (commit's second phase); return the trunk's version."""

    def abort_round(self, experiment: str, server_round: int, attempt: int, why: str) -> int:
        """Roll back to the round's beginning, or end an evaluation; return the trunk's version."""

    def status(self) -> TrunkStatus:
        """Return where the trunk stands."""

    def get_adapter(self) -> dict[str, Tensor]:
        """Return the trunk's trainable parameters, fp32 on the CPU, by the unsplit model's names."""
