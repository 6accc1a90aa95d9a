"""The trunk's protocol as values: keys, calls, plans, replies.

The service makes them of protobuf messages, and the engine takes them: it needs no grpc, no protobuf.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from flower_split.protocol.step_every import StepEvery
from flower_split.split.structure.kv_cache import CacheStep


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
class FinishRule:
    """How the optimizer steps of a round end beyond what each party can do by itself."""

    max_grad_norm: float = 0.0  # L2, over the whole model; 0: each part clips by itself
    share_gradients: bool = False  # every client steps with the mean of the clients' gradients


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
    coordinator_seconds: float = 0.0  # without its word, the round is given up; 0: never
    evaluate: bool = False
    base: RoundBase | None = None  # None: begin with the weights that are there
    dispatches: tuple[Dispatch, ...] = ()  # asynchronous: everybody at work, old and new
    finish: FinishRule | None = None  # local-step: every step ends with FinishStep; None: none does

    @property
    def asynchronous(self) -> bool:
        """Whether dispatches take part, not participants, and the round is one step of arrivals."""
        return self.step_every is StepEvery.BUFFER


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
    finish: FinishRule | None = None  # None: no step ends with FinishStep


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ForwardCall:
    """One forward of one client, as the trunk's service has read and checked it.

    Shapes: hidden states ``[batch, seq, hidden]``; padding mask ``[batch, seq]``; position ids
    ``[batch or 1, seq]``.
    """

    session: str  # from the session's grant, as is the epoch
    epoch: int
    key: ContributionKey | None = None  # names the micro-batch; None: an evaluation
    version: int  # that the client expects the weights to have
    mode: ForwardMode
    tensors: Mapping[str, Tensor]  # ``hidden_states``, and what TrunkInputs names
    digest: bytes  # XXH3-128 of the request's content; empty: an evaluation without a cache
    deadline: float  # when to give up waiting, on the monotonic clock
    acknowledged: int = 0  # the client has the replies of all earlier micro-batches of this window
    last: bool = False  # whether the slot sends no further micro-batch in this window
    use_cache: bool | None = None  # as the model's own argument
    cache: CacheStep | None = None  # evaluation: go on from this key-value cache, and keep it
    released: tuple[int, ...] = ()  # the session's key-value caches that the client is done with


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BackwardCall:
    """One backward of one client, as the trunk's service has read and checked it."""

    session: str  # from the session's grant, as is the epoch
    epoch: int
    key: ContributionKey  # that of the forward
    version: int  # that of the forward's reply
    grad: Tensor  # of the client's loss by ``trunk_output``, [batch, seq, hidden]
    num_tokens: float  # label tokens of the micro-batch
    loss_denominator: float  # what the client divided its summed token loss by
    last: bool  # whether the slot sends no further micro-batch in this window
    digest: bytes  # XXH3-128 of the request's content
    deadline: float  # when to give up waiting, on the monotonic clock


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FinishCall:
    """The end of one client's optimizer step, after the last backward of its window."""

    session: str  # from the session's grant, as is the epoch
    epoch: int
    key: ContributionKey  # its micro_batch: how many the window had from this client
    grad_norm_squared: float  # L2, of the client's own gradient, for the mean loss of its tokens
    gradients: Mapping[str, Tensor]  # the client's own, where the round shares them; sorted by name
    digest: bytes  # XXH3-128 of the request's content
    deadline: float  # when to give up waiting, on the monotonic clock


@dataclass(frozen=True, slots=True)
class FinishResult:
    """The reply to a FinishStep, when the trunk has stepped."""

    clip_factor: float  # what every gradient of the step is multiplied by
    grad_norm: float  # L2, over the whole model, before clipping
    gradients: Mapping[str, Tensor]  # reduced and not clipped; empty where they are not shared
    version: int  # of the new weights
    compute_seconds: float
    queue_seconds: float  # for the other clients of the window


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
    # Of a status only:
    joined: bool = False
    waited_seconds: float = 0.0  # that others have waited for it now; 0: nobody does
    silent_seconds: float = 0.0  # since its latest call; 0: it has made none


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationReport:
    """What is kept between forward and backward, over a round."""

    num_bytes: int = 0  # now
    peak_bytes: int = 0
    budget_bytes: int = 0
    recomputes: int = 0  # forwards whose graph did not fit and was not kept
    refusals: int = 0  # forwards that did not fit at all


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchReport:
    """The joint batches of a round; zeros where every micro-batch is computed alone."""

    batches: int = 0
    passes: int = 0  # that they took: one each, where everything in it could be joined
    partial: int = 0  # batches that went on without somebody who had planned them
    sums_again: int = 0  # windows summed again without a client that had contributed


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """The outcome of a round, before it is committed."""

    version: int
    digest: str  # SHA-256 of the trainable parameters, in name order
    slots: tuple[SlotReport, ...]
    optimizer_steps: int
    compute_seconds: float
    activations: ActivationReport = field(default_factory=ActivationReport)
    batches: BatchReport = field(default_factory=BatchReport)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessReport:
    """The trunk's process, since it started."""

    package_version: str = ""
    uptime_seconds: float = 0.0
    round_seconds: float = 0.0  # since the round began
    queue_seconds: float = 0.0  # that the compute thread lets a call wait now
    resident_bytes: int = 0
    accelerator_bytes: int = 0  # that torch has allocated; 0: no accelerator
    accelerator_peak_bytes: int = 0  # the most that it has had allocated
    bytes_received: int = 0  # in clients' calls
    bytes_sent: int = 0
    rounds_committed: int = 0
    rounds_aborted: int = 0
    checkpoint_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentReport:
    """One of several experiments that a trunk serves, as its coordinator sees it."""

    name: str
    phase: str = "idle"
    server_round: int = 0
    attempt: int = 0
    version: int = 0  # of its weights: optimizer steps taken
    num_tokens: float = 0.0  # of its round
    participants: int = 0
    compute_seconds: float = 0.0  # since it began here
    silent_seconds: float = 0.0  # since its coordinator spoke


EVALUATION_ENDED = (
    "the evaluation ended"  # why its coordinator gives such a round up: nothing stays of it
)


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
    process: ProcessReport = field(default_factory=ProcessReport)
    batches: BatchReport = field(default_factory=BatchReport)
    revoked: tuple[int, ...] = ()  # slots that an operator took out of the experiment
    max_experiments: int = 1  # that the trunk serves at once
    experiments: tuple[
        ExperimentReport, ...
    ] = ()  # of the coordinator that asks, where several are
