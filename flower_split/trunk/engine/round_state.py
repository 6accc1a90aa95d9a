"""All that belongs to one attempt of one server round on the trunk."""

import hashlib
from dataclasses import dataclass, field

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import (
    CallResult,
    ContributionKey,
    RoundPlan,
    RoundReport,
    SlotReport,
)
from flower_split.split import CutLayers
from flower_split.trunk.compute.compute import Snapshot
from flower_split.trunk.compute.gradients import SlotGradient
from flower_split.trunk.engine.ledger import CallKind, CallName, Ledger
from flower_split.trunk.engine.windows import Phase, WindowMachine


@dataclass(frozen=True, slots=True)
class Session:
    """A client of the open round."""

    id: str
    slot: int
    planned_steps: int
    cuts: CutLayers | None = None  # the client's own; None: the trunk's


@dataclass(slots=True)
class Round:
    """State of one attempt; the engine's lock guards it."""

    plan: RoundPlan
    windows: WindowMachine
    before: Snapshot  # what an abort goes back to
    slots_by_token: dict[bytes, int]
    ledger: Ledger[CallResult] = field(default_factory=Ledger)
    sessions: dict[str, Session] = field(default_factory=dict)
    cuts: dict[int, CutLayers | None] = field(default_factory=dict)  # of who has joined, by slot
    closed: set[str] = field(default_factory=set)  # sessions whose client has left
    gradients: dict[int, SlotGradient] = field(default_factory=dict)  # of the open window, by slot
    received: dict[int, int] = field(default_factory=dict)  # bytes on the wire, by slot
    sent: dict[int, int] = field(default_factory=dict)
    turn: tuple[int, int, int] | None = None  # step-every contribution: whose forward is open
    turn_since: float = 0.0
    last_activity: float = 0.0
    last_seen: dict[int, float] = field(default_factory=dict)  # slot -> its latest call
    compute_seconds: float = 0.0
    ledger_hash: int = (
        0  # the contributions counted: their hashes, XORed, so that order is no matter
    )
    report: RoundReport | None = None
    committed: bool = False
    rolled_back: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more can happen in it."""
        return self.committed or self.windows.phase is Phase.ABORTED

    def slot_of(self, token: str) -> int:
        """Whose session token this is.

        Raises:
            TrunkRefused: Nobody's of this round (UNAUTHENTICATED).
        """
        slot = self.slots_by_token.get(hashed(token))
        if slot is None:
            raise TrunkRefused(
                RefusalReason.UNAUTHENTICATED,
                f"the session token does not belong to {self}. Tokens are handed out by the "
                "strategy, one per client and round; this client's message is of another round.",
            )
        return slot

    def name_of(self, member: Session, key: ContributionKey | None, kind: CallKind) -> CallName:
        """A training call's name in the ledger; its slot is the session's, whatever the key says.

        Raises:
            TrunkRefused: There is no key, the round only evaluates, or the key is of another attempt.
        """
        plan = self.plan
        if plan.evaluate or key is None:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                "a training call needs a contribution key, and a session of a training round.",
            )
        if (key.experiment, key.server_round, key.attempt) != (
            plan.experiment,
            plan.server_round,
            plan.attempt,
        ):
            raise TrunkRefused(
                RefusalReason.WRONG_ATTEMPT,
                f"slot {member.slot} sends a contribution to round {key.server_round} (attempt "
                f"{key.attempt}); {self} is open.",
            )
        return CallName(member.slot, key.window, key.micro_batch, kind)

    def __str__(self) -> str:
        plan = self.plan
        kind = "evaluation" if plan.evaluate else "round"
        return (
            f"{kind} {plan.server_round} (attempt {plan.attempt}) of experiment {plan.experiment}"
        )


def hashed(token: str) -> bytes:
    """Tokens are looked up by their SHA-256, so that no comparison leaks their bytes."""
    return hashlib.sha256(token.encode()).digest()


def contribution_hash(name: CallName, digest: bytes) -> int:
    """A contribution as a number; see :attr:`Round.ledger_hash`."""
    text = f"{name.slot}/{name.window}/{name.micro_batch}/".encode() + digest
    return int.from_bytes(hashlib.sha256(text).digest(), "big")


def seed_name(current: Round, name: CallName) -> str:
    """Names a micro-batch for its dropout seed: the same in every attempt and every run."""
    return f"{current.plan.server_round}/{name.window}/{name.slot}/{name.micro_batch}"


def slot_reports(current: Round) -> tuple[SlotReport, ...]:
    """What every participant has done so far."""
    return tuple(
        SlotReport(
            slot=slot,
            completed=state.finished,
            problem=state.dropped,
            contributions=state.contributions,
            num_tokens=state.num_tokens,
            bytes_received=current.received.get(slot, 0),
            bytes_sent=current.sent.get(slot, 0),
        )
        for slot, state in current.windows.slots.items()
    )
