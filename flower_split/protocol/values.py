"""What crosses the seam between the trunk's RPC shell and its engine: keys, plans, replies.

These are the protocol's messages as plain values, so that the engine needs no grpc and no protobuf.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from flower_split.protocol.step_every import StepEvery


@dataclass(frozen=True, slots=True)
class ContributionKey:
    """Names one micro-batch for ever; deterministic, so that a retry is recognised."""

    experiment: str
    server_round: int  # from 1
    attempt: int  # from 0
    window: int  # from 0, within the round
    micro_batch: int  # from 0, within the window


class ForwardMode(Enum):
    """What a forward keeps."""

    TRAIN = 1
    """What backward needs."""
    NO_GRAD = 2
    """Nothing; dropout as in training (mode forward-only)."""
    EVALUATE = 3
    """Nothing; no dropout, no round, no key."""


@dataclass(frozen=True, slots=True)
class RoundBase:
    """The committed round whose weights a round begins with."""

    server_round: int  # 0: the initial weights
    digest: str = ""  # of the trainable parameters, as the round's report gave it


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One client sent to work in an asynchronous round, from the weights of that moment."""

    number: int  # unique in the experiment, from 1
    slot: int
    token: str  # of its session


@dataclass(frozen=True, slots=True)
class Arrival:
    """A dispatch whose work is done and enters the round's step."""

    dispatch: int
    factor: float  # in (0, 1]: how much it counts, by its staleness


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundPlan:
    """What the coordinator says when it begins a round; see ``BeginRoundRequest``."""

    experiment: str
    server_round: int
    attempt: int
    participants: Mapping[int, str]  # slot -> session token
    step_every: StepEvery = StepEvery.LOCAL_STEP
    steps_per_round: int = 1  # of the longest participant; places the learning-rate schedule
    num_server_rounds: int = 1
    quorum: float = 1.0
    join_seconds: float = 120.0
    window_seconds: float = 120.0
    evaluate: bool = False
    base: RoundBase | None = None  # None: begin with the weights that are there
    dispatches: tuple[Dispatch, ...] = ()  # step_every BUFFER: everybody at work, old and new


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionGrant:
    """What a client learns when it joins."""

    session: str
    epoch: int  # of the trunk process
    version: int  # of the trunk's weights: optimizer steps taken
    experiment: str
    server_round: int
    attempt: int
    lease_seconds: float
    slot: int


@dataclass(frozen=True, slots=True)
class CallResult:
    """The reply to a forward (trunk_output) or a backward (smashed_grad)."""

    tensor: Tensor
    version: int
    compute_seconds: float
    queue_seconds: float  # from arrival: for other clients of the window, and for the processor


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotReport:
    """What one participant did in a round."""

    slot: int
    completed: bool = False
    problem: str = ""
    contributions: int = 0
    num_tokens: float = 0.0
    bytes_received: int = 0
    bytes_sent: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationReport:
    """What is kept between forward and backward, over a round."""

    num_bytes: int = 0  # now
    peak_bytes: int = 0
    budget_bytes: int = 0
    recomputes: int = 0  # forwards whose graph did not fit and was not kept
    refusals: int = 0  # forwards that did not fit at all


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """The outcome of a round, before it is committed."""

    version: int
    digest: str  # SHA-256 of the trainable parameters, in name order
    slots: tuple[SlotReport, ...]
    optimizer_steps: int
    compute_seconds: float
    activations: ActivationReport = field(default_factory=ActivationReport)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkStatus:
    """A snapshot for progress displays and health checks."""

    epoch: int
    version: int
    experiment: str = ""
    server_round: int = 0
    attempt: int = 0
    phase: str = "idle"
    window: int = 0
    num_tokens: float = 0.0
    bytes_received: int = 0
    bytes_sent: int = 0
    slots: tuple[SlotReport, ...] = ()
    problem: str = ""
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    activations: ActivationReport = field(default_factory=ActivationReport)
