from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    INT64: _ClassVar[DType]
    INT32: _ClassVar[DType]
    UINT8: _ClassVar[DType]
    BOOL: _ClassVar[DType]
    FLOAT64: _ClassVar[DType]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    RAW: _ClassVar[Codec]
    BITS: _ClassVar[Codec]

class ForwardMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORWARD_MODE_UNSPECIFIED: _ClassVar[ForwardMode]
    TRAIN: _ClassVar[ForwardMode]
    NO_GRAD: _ClassVar[ForwardMode]
    EVALUATE: _ClassVar[ForwardMode]

class StepEvery(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_EVERY_UNSPECIFIED: _ClassVar[StepEvery]
    LOCAL_STEP: _ClassVar[StepEvery]
    SERVER_ROUND: _ClassVar[StepEvery]
    CONTRIBUTION: _ClassVar[StepEvery]
    BUFFER: _ClassVar[StepEvery]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
BFLOAT16: DType
FLOAT16: DType
INT64: DType
INT32: DType
UINT8: DType
BOOL: DType
FLOAT64: DType
CODEC_UNSPECIFIED: Codec
RAW: Codec
BITS: Codec
FORWARD_MODE_UNSPECIFIED: ForwardMode
TRAIN: ForwardMode
NO_GRAD: ForwardMode
EVALUATE: ForwardMode
STEP_EVERY_UNSPECIFIED: StepEvery
LOCAL_STEP: StepEvery
SERVER_ROUND: StepEvery
CONTRIBUTION: StepEvery
BUFFER: StepEvery

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape", "codec", "num_bytes", "on_device")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    ON_DEVICE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    codec: Codec
    num_bytes: int
    on_device: bool
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., codec: _Optional[_Union[Codec, str]] = ..., num_bytes: _Optional[int] = ..., on_device: _Optional[bool] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: Header
    payload: bytes
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("tensors", "forward", "backward", "reply", "finish_step", "shared", "device")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    FINISH_STEP_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    forward: ForwardHeader
    backward: BackwardHeader
    reply: ReplyHeader
    finish_step: FinishStepHeader
    shared: SharedPayload
    device: SharedPayload
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., forward: _Optional[_Union[ForwardHeader, _Mapping]] = ..., backward: _Optional[_Union[BackwardHeader, _Mapping]] = ..., reply: _Optional[_Union[ReplyHeader, _Mapping]] = ..., finish_step: _Optional[_Union[FinishStepHeader, _Mapping]] = ..., shared: _Optional[_Union[SharedPayload, _Mapping]] = ..., device: _Optional[_Union[SharedPayload, _Mapping]] = ...) -> None: ...

class SharedPayload(_message.Message):
    __slots__ = ("slot", "generation", "offset")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    slot: int
    generation: int
    offset: int
    def __init__(self, slot: _Optional[int] = ..., generation: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class ContributionKey(_message.Message):
    __slots__ = ("experiment", "server_round", "attempt", "window", "micro_batch")
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    SERVER_ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    experiment: str
    server_round: int
    attempt: int
    window: int
    micro_batch: int
    def __init__(self, experiment: _Optional[str] = ..., server_round: _Optional[int] = ..., attempt: _Optional[int] = ..., window: _Optional[int] = ..., micro_batch: _Optional[int] = ...) -> None: ...

class ForwardHeader(_message.Message):
    __slots__ = ("session", "trunk_epoch", "key", "version", "mode", "acknowledged", "use_cache", "cache", "released_caches", "last")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TRUNK_EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    USE_CACHE_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    RELEASED_CACHES_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    session: str
    trunk_epoch: int
    key: ContributionKey
    version: int
    mode: ForwardMode
    acknowledged: int
    use_cache: bool
    cache: CacheUse
    released_caches: _containers.RepeatedScalarFieldContainer[int]
    last: bool
    def __init__(self, session: _Optional[str] = ..., trunk_epoch: _Optional[int] = ..., key: _Optional[_Union[ContributionKey, _Mapping]] = ..., version: _Optional[int] = ..., mode: _Optional[_Union[ForwardMode, str]] = ..., acknowledged: _Optional[int] = ..., use_cache: _Optional[bool] = ..., cache: _Optional[_Union[CacheUse, _Mapping]] = ..., released_caches: _Optional[_Iterable[int]] = ..., last: _Optional[bool] = ...) -> None: ...

class CacheUse(_message.Message):
    __slots__ = ("id", "step", "past_length")
    ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PAST_LENGTH_FIELD_NUMBER: _ClassVar[int]
    id: int
    step: int
    past_length: int
    def __init__(self, id: _Optional[int] = ..., step: _Optional[int] = ..., past_length: _Optional[int] = ...) -> None: ...

class BackwardHeader(_message.Message):
    __slots__ = ("session", "trunk_epoch", "key", "version", "num_tokens", "loss_denominator", "last", "without_zeros")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TRUNK_EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOSS_DENOMINATOR_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_ZEROS_FIELD_NUMBER: _ClassVar[int]
    session: str
    trunk_epoch: int
    key: ContributionKey
    version: int
    num_tokens: float
    loss_denominator: float
    last: bool
    without_zeros: bool
    def __init__(self, session: _Optional[str] = ..., trunk_epoch: _Optional[int] = ..., key: _Optional[_Union[ContributionKey, _Mapping]] = ..., version: _Optional[int] = ..., num_tokens: _Optional[float] = ..., loss_denominator: _Optional[float] = ..., last: _Optional[bool] = ..., without_zeros: _Optional[bool] = ...) -> None: ...

class FinishStepHeader(_message.Message):
    __slots__ = ("session", "trunk_epoch", "key", "grad_norm_squared")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TRUNK_EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_SQUARED_FIELD_NUMBER: _ClassVar[int]
    session: str
    trunk_epoch: int
    key: ContributionKey
    grad_norm_squared: float
    def __init__(self, session: _Optional[str] = ..., trunk_epoch: _Optional[int] = ..., key: _Optional[_Union[ContributionKey, _Mapping]] = ..., grad_norm_squared: _Optional[float] = ...) -> None: ...

class ReplyHeader(_message.Message):
    __slots__ = ("version", "compute_seconds", "queue_seconds", "clip_factor", "grad_norm")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CLIP_FACTOR_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    version: int
    compute_seconds: float
    queue_seconds: float
    clip_factor: float
    grad_norm: float
    def __init__(self, version: _Optional[int] = ..., compute_seconds: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., clip_factor: _Optional[float] = ..., grad_norm: _Optional[float] = ...) -> None: ...

class WaitVersionRequest(_message.Message):
    __slots__ = ("session", "trunk_epoch", "version")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TRUNK_EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    trunk_epoch: int
    version: int
    def __init__(self, session: _Optional[str] = ..., trunk_epoch: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class WaitVersionReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class ShareMemoryRequest(_message.Message):
    __slots__ = ("boot_id", "user", "devices", "device_bytes")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    user: int
    devices: _containers.RepeatedScalarFieldContainer[str]
    device_bytes: int
    def __init__(self, boot_id: _Optional[str] = ..., user: _Optional[int] = ..., devices: _Optional[_Iterable[str]] = ..., device_bytes: _Optional[int] = ...) -> None: ...

class ShareMemoryReply(_message.Message):
    __slots__ = ("process", "descriptor", "num_bytes", "nonce", "device_handle", "device_bytes", "device")
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_HANDLE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    process: int
    descriptor: int
    num_bytes: int
    nonce: bytes
    device_handle: bytes
    device_bytes: int
    device: str
    def __init__(self, process: _Optional[int] = ..., descriptor: _Optional[int] = ..., num_bytes: _Optional[int] = ..., nonce: _Optional[bytes] = ..., device_handle: _Optional[bytes] = ..., device_bytes: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("fingerprint", "planned_steps", "evaluate", "cuts")
    class FingerprintEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PLANNED_STEPS_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: _containers.ScalarMap[str, str]
    planned_steps: int
    evaluate: bool
    cuts: CutLayers
    def __init__(self, fingerprint: _Optional[_Mapping[str, str]] = ..., planned_steps: _Optional[int] = ..., evaluate: _Optional[bool] = ..., cuts: _Optional[_Union[CutLayers, _Mapping]] = ...) -> None: ...

class CutLayers(_message.Message):
    __slots__ = ("first", "second")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    first: int
    second: int
    def __init__(self, first: _Optional[int] = ..., second: _Optional[int] = ...) -> None: ...

class FinishRule(_message.Message):
    __slots__ = ("max_grad_norm", "share_gradients")
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    SHARE_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    max_grad_norm: float
    share_gradients: bool
    def __init__(self, max_grad_norm: _Optional[float] = ..., share_gradients: _Optional[bool] = ...) -> None: ...

class OpenSessionReply(_message.Message):
    __slots__ = ("session", "trunk_epoch", "version", "experiment", "server_round", "attempt", "max_tensor_bytes", "lease_seconds", "slot", "finish", "without_zeros")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TRUNK_EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    SERVER_ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_ZEROS_FIELD_NUMBER: _ClassVar[int]
    session: str
    trunk_epoch: int
    version: int
    experiment: str
    server_round: int
    attempt: int
    max_tensor_bytes: int
    lease_seconds: float
    slot: int
    finish: FinishRule
    without_zeros: bool
    def __init__(self, session: _Optional[str] = ..., trunk_epoch: _Optional[int] = ..., version: _Optional[int] = ..., experiment: _Optional[str] = ..., server_round: _Optional[int] = ..., attempt: _Optional[int] = ..., max_tensor_bytes: _Optional[int] = ..., lease_seconds: _Optional[float] = ..., slot: _Optional[int] = ..., finish: _Optional[_Union[FinishRule, _Mapping]] = ..., without_zeros: _Optional[bool] = ...) -> None: ...

class ShortenPlanRequest(_message.Message):
    __slots__ = ("session", "trunk_epoch", "planned_steps")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TRUNK_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLANNED_STEPS_FIELD_NUMBER: _ClassVar[int]
    session: str
    trunk_epoch: int
    planned_steps: int
    def __init__(self, session: _Optional[str] = ..., trunk_epoch: _Optional[int] = ..., planned_steps: _Optional[int] = ...) -> None: ...

class ShortenPlanReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session", "trunk_epoch")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TRUNK_EPOCH_FIELD_NUMBER: _ClassVar[int]
    session: str
    trunk_epoch: int
    def __init__(self, session: _Optional[str] = ..., trunk_epoch: _Optional[int] = ...) -> None: ...

class CloseSessionReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Participant(_message.Message):
    __slots__ = ("slot", "token")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    slot: int
    token: str
    def __init__(self, slot: _Optional[int] = ..., token: _Optional[str] = ...) -> None: ...

class BeginRoundRequest(_message.Message):
    __slots__ = ("experiment", "server_round", "attempt", "participants", "step_every", "steps_per_round", "num_server_rounds", "quorum", "join_seconds", "window_seconds", "evaluate", "base", "finish", "coordinator_seconds", "dispatches", "settings")
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    SERVER_ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANTS_FIELD_NUMBER: _ClassVar[int]
    STEP_EVERY_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_ROUND_FIELD_NUMBER: _ClassVar[int]
    NUM_SERVER_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    JOIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DISPATCHES_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    experiment: str
    server_round: int
    attempt: int
    participants: _containers.RepeatedCompositeFieldContainer[Participant]
    step_every: StepEvery
    steps_per_round: int
    num_server_rounds: int
    quorum: float
    join_seconds: float
    window_seconds: float
    evaluate: bool
    base: RoundBase
    finish: FinishRule
    coordinator_seconds: float
    dispatches: _containers.RepeatedCompositeFieldContainer[Dispatch]
    settings: ExperimentSettings
    def __init__(self, experiment: _Optional[str] = ..., server_round: _Optional[int] = ..., attempt: _Optional[int] = ..., participants: _Optional[_Iterable[_Union[Participant, _Mapping]]] = ..., step_every: _Optional[_Union[StepEvery, str]] = ..., steps_per_round: _Optional[int] = ..., num_server_rounds: _Optional[int] = ..., quorum: _Optional[float] = ..., join_seconds: _Optional[float] = ..., window_seconds: _Optional[float] = ..., evaluate: _Optional[bool] = ..., base: _Optional[_Union[RoundBase, _Mapping]] = ..., finish: _Optional[_Union[FinishRule, _Mapping]] = ..., coordinator_seconds: _Optional[float] = ..., dispatches: _Optional[_Iterable[_Union[Dispatch, _Mapping]]] = ..., settings: _Optional[_Union[ExperimentSettings, _Mapping]] = ...) -> None: ...

class ExperimentSettings(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: SettingValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[SettingValue, _Mapping]] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.MessageMap[str, SettingValue]
    def __init__(self, values: _Optional[_Mapping[str, SettingValue]] = ...) -> None: ...

class SettingValue(_message.Message):
    __slots__ = ("text", "flag", "whole", "number")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    text: str
    flag: bool
    whole: int
    number: float
    def __init__(self, text: _Optional[str] = ..., flag: _Optional[bool] = ..., whole: _Optional[int] = ..., number: _Optional[float] = ...) -> None: ...

class Dispatch(_message.Message):
    __slots__ = ("number", "slot", "token")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    number: int
    slot: int
    token: str
    def __init__(self, number: _Optional[int] = ..., slot: _Optional[int] = ..., token: _Optional[str] = ...) -> None: ...

class Arrival(_message.Message):
    __slots__ = ("dispatch", "factor")
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    dispatch: int
    factor: float
    def __init__(self, dispatch: _Optional[int] = ..., factor: _Optional[float] = ...) -> None: ...

class RoundBase(_message.Message):
    __slots__ = ("server_round", "digest")
    SERVER_ROUND_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    server_round: int
    digest: str
    def __init__(self, server_round: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class BeginRoundReply(_message.Message):
    __slots__ = ("trunk_epoch", "version")
    TRUNK_EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    trunk_epoch: int
    version: int
    def __init__(self, trunk_epoch: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class PrepareRoundRequest(_message.Message):
    __slots__ = ("experiment", "server_round", "attempt", "arrivals")
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    SERVER_ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ARRIVALS_FIELD_NUMBER: _ClassVar[int]
    experiment: str
    server_round: int
    attempt: int
    arrivals: _containers.RepeatedCompositeFieldContainer[Arrival]
    def __init__(self, experiment: _Optional[str] = ..., server_round: _Optional[int] = ..., attempt: _Optional[int] = ..., arrivals: _Optional[_Iterable[_Union[Arrival, _Mapping]]] = ...) -> None: ...

class SlotReport(_message.Message):
    __slots__ = ("slot", "completed", "problem", "contributions", "num_tokens", "bytes_received", "bytes_sent", "joined", "waited_seconds", "silent_seconds")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SILENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    completed: bool
    problem: str
    contributions: int
    num_tokens: float
    bytes_received: int
    bytes_sent: int
    joined: bool
    waited_seconds: float
    silent_seconds: float
    def __init__(self, slot: _Optional[int] = ..., completed: _Optional[bool] = ..., problem: _Optional[str] = ..., contributions: _Optional[int] = ..., num_tokens: _Optional[float] = ..., bytes_received: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., joined: _Optional[bool] = ..., waited_seconds: _Optional[float] = ..., silent_seconds: _Optional[float] = ...) -> None: ...

class PrepareRoundReply(_message.Message):
    __slots__ = ("version", "digest", "slots", "optimizer_steps", "compute_seconds", "activations", "batches")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_STEPS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    slots: _containers.RepeatedCompositeFieldContainer[SlotReport]
    optimizer_steps: int
    compute_seconds: float
    activations: ActivationReport
    batches: BatchReport
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., slots: _Optional[_Iterable[_Union[SlotReport, _Mapping]]] = ..., optimizer_steps: _Optional[int] = ..., compute_seconds: _Optional[float] = ..., activations: _Optional[_Union[ActivationReport, _Mapping]] = ..., batches: _Optional[_Union[BatchReport, _Mapping]] = ...) -> None: ...

class ActivationReport(_message.Message):
    __slots__ = ("num_bytes", "peak_bytes", "budget_bytes", "recomputes", "refusals")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTES_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    peak_bytes: int
    budget_bytes: int
    recomputes: int
    refusals: int
    def __init__(self, num_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., recomputes: _Optional[int] = ..., refusals: _Optional[int] = ...) -> None: ...

class BatchReport(_message.Message):
    __slots__ = ("batches", "passes", "partial", "sums_again")
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    SUMS_AGAIN_FIELD_NUMBER: _ClassVar[int]
    batches: int
    passes: int
    partial: int
    sums_again: int
    def __init__(self, batches: _Optional[int] = ..., passes: _Optional[int] = ..., partial: _Optional[int] = ..., sums_again: _Optional[int] = ...) -> None: ...

class CommitRoundRequest(_message.Message):
    __slots__ = ("experiment", "server_round", "attempt")
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    SERVER_ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    experiment: str
    server_round: int
    attempt: int
    def __init__(self, experiment: _Optional[str] = ..., server_round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class CommitRoundReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class RevokeClientRequest(_message.Message):
    __slots__ = ("slots", "subject", "experiment")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    subject: str
    experiment: str
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., subject: _Optional[str] = ..., experiment: _Optional[str] = ...) -> None: ...

class RevokeClientReply(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slots: _Optional[_Iterable[int]] = ...) -> None: ...

class AbortRoundRequest(_message.Message):
    __slots__ = ("experiment", "server_round", "attempt", "why")
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    SERVER_ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    experiment: str
    server_round: int
    attempt: int
    why: str
    def __init__(self, experiment: _Optional[str] = ..., server_round: _Optional[int] = ..., attempt: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class AbortRoundReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("keep_alive", "experiment")
    KEEP_ALIVE_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    keep_alive: bool
    experiment: str
    def __init__(self, keep_alive: _Optional[bool] = ..., experiment: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("trunk_epoch", "version", "experiment", "server_round", "attempt", "phase", "window", "num_tokens", "bytes_received", "bytes_sent", "slots", "problem", "fingerprint", "activations", "process", "batches", "revoked", "max_experiments", "experiments")
    class FingerprintEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TRUNK_EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    SERVER_ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    MAX_EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    trunk_epoch: int
    version: int
    experiment: str
    server_round: int
    attempt: int
    phase: str
    window: int
    num_tokens: float
    bytes_received: int
    bytes_sent: int
    slots: _containers.RepeatedCompositeFieldContainer[SlotReport]
    problem: str
    fingerprint: _containers.ScalarMap[str, str]
    activations: ActivationReport
    process: ProcessReport
    batches: BatchReport
    revoked: _containers.RepeatedScalarFieldContainer[int]
    max_experiments: int
    experiments: _containers.RepeatedCompositeFieldContainer[ExperimentReport]
    def __init__(self, trunk_epoch: _Optional[int] = ..., version: _Optional[int] = ..., experiment: _Optional[str] = ..., server_round: _Optional[int] = ..., attempt: _Optional[int] = ..., phase: _Optional[str] = ..., window: _Optional[int] = ..., num_tokens: _Optional[float] = ..., bytes_received: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[SlotReport, _Mapping]]] = ..., problem: _Optional[str] = ..., fingerprint: _Optional[_Mapping[str, str]] = ..., activations: _Optional[_Union[ActivationReport, _Mapping]] = ..., process: _Optional[_Union[ProcessReport, _Mapping]] = ..., batches: _Optional[_Union[BatchReport, _Mapping]] = ..., revoked: _Optional[_Iterable[int]] = ..., max_experiments: _Optional[int] = ..., experiments: _Optional[_Iterable[_Union[ExperimentReport, _Mapping]]] = ...) -> None: ...

class ExperimentReport(_message.Message):
    __slots__ = ("name", "phase", "server_round", "attempt", "version", "num_tokens", "participants", "compute_seconds", "silent_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SERVER_ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANTS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SILENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    phase: str
    server_round: int
    attempt: int
    version: int
    num_tokens: float
    participants: int
    compute_seconds: float
    silent_seconds: float
    def __init__(self, name: _Optional[str] = ..., phase: _Optional[str] = ..., server_round: _Optional[int] = ..., attempt: _Optional[int] = ..., version: _Optional[int] = ..., num_tokens: _Optional[float] = ..., participants: _Optional[int] = ..., compute_seconds: _Optional[float] = ..., silent_seconds: _Optional[float] = ...) -> None: ...

class ProcessReport(_message.Message):
    __slots__ = ("package_version", "uptime_seconds", "round_seconds", "queue_seconds", "resident_bytes", "accelerator_bytes", "bytes_received", "bytes_sent", "rounds_committed", "rounds_aborted", "checkpoint_seconds", "compute_seconds", "accelerator_peak_bytes")
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_ABORTED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    package_version: str
    uptime_seconds: float
    round_seconds: float
    queue_seconds: float
    resident_bytes: int
    accelerator_bytes: int
    bytes_received: int
    bytes_sent: int
    rounds_committed: int
    rounds_aborted: int
    checkpoint_seconds: float
    compute_seconds: float
    accelerator_peak_bytes: int
    def __init__(self, package_version: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., round_seconds: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., resident_bytes: _Optional[int] = ..., accelerator_bytes: _Optional[int] = ..., bytes_received: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., rounds_committed: _Optional[int] = ..., rounds_aborted: _Optional[int] = ..., checkpoint_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ..., accelerator_peak_bytes: _Optional[int] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("experiment",)
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    experiment: str
    def __init__(self, experiment: _Optional[str] = ...) -> None: ...

class EndExperimentRequest(_message.Message):
    __slots__ = ("experiment",)
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    experiment: str
    def __init__(self, experiment: _Optional[str] = ...) -> None: ...

class EndExperimentReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "message")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[Refusal.Reason]
        UNAUTHENTICATED: _ClassVar[Refusal.Reason]
        FINGERPRINT_MISMATCH: _ClassVar[Refusal.Reason]
        WRONG_EPOCH: _ClassVar[Refusal.Reason]
        WRONG_ATTEMPT: _ClassVar[Refusal.Reason]
        STALE_VERSION: _ClassVar[Refusal.Reason]
        DIGEST_MISMATCH: _ClassVar[Refusal.Reason]
        UNKNOWN_SESSION: _ClassVar[Refusal.Reason]
        UNKNOWN_CONTRIBUTION: _ClassVar[Refusal.Reason]
        NON_FINITE: _ClassVar[Refusal.Reason]
        DROPPED: _ClassVar[Refusal.Reason]
        OVER_BUDGET: _ClassVar[Refusal.Reason]
        INVALID_REQUEST: _ClassVar[Refusal.Reason]
        NO_ROUND: _ClassVar[Refusal.Reason]
        NO_CHECKPOINT: _ClassVar[Refusal.Reason]
        UNKNOWN_CACHE: _ClassVar[Refusal.Reason]
    REASON_UNSPECIFIED: Refusal.Reason
    UNAUTHENTICATED: Refusal.Reason
    FINGERPRINT_MISMATCH: Refusal.Reason
    WRONG_EPOCH: Refusal.Reason
    WRONG_ATTEMPT: Refusal.Reason
    STALE_VERSION: Refusal.Reason
    DIGEST_MISMATCH: Refusal.Reason
    UNKNOWN_SESSION: Refusal.Reason
    UNKNOWN_CONTRIBUTION: Refusal.Reason
    NON_FINITE: Refusal.Reason
    DROPPED: Refusal.Reason
    OVER_BUDGET: Refusal.Reason
    INVALID_REQUEST: Refusal.Reason
    NO_ROUND: Refusal.Reason
    NO_CHECKPOINT: Refusal.Reason
    UNKNOWN_CACHE: Refusal.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: Refusal.Reason
    message: str
    def __init__(self, reason: _Optional[_Union[Refusal.Reason, str]] = ..., message: _Optional[str] = ...) -> None: ...
