"""The trunk server."""

from dataclasses import dataclass, field

from flower_split.config.train import COMPUTE_MODES, OptimizerConfig, check_device_map
from flower_split.config.validation import (
    above,
    at_least,
    check_address,
    check_proxy,
    kebab,
    one_of,
    plug_in_name,
    share,
)
from flower_split.errors import ConfigError

STEP_EVERY = ("local-step", "server-round", "contribution")
WINDOW_BATCHES = ("off", "on")
ON_BAD_CLIENT = ("exclude", "abort")
MIN_STREAM_WINDOW, MAX_STREAM_WINDOW = 1 << 16, 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkConfig:
    """The trunk server: where it is, how it steps, how long it waits."""

    address: str = ""
    """host:port of a running trunk; empty: the ServerApp starts one on loopback."""
    token_file: str = ""
    """File with the coordinator token of a running trunk; empty: the ServerApp's environment has it, as
    FLOWER_SPLIT_TRUNK_TOKEN."""
    root_certificates: str = ""
    """PEM file of the CA for TLS; empty: plain text, on loopback only."""
    client_certificate: str = ""
    """PEM file shown to a trunk with --client-ca; a node config's client-certificate comes first."""
    client_key: str = ""
    """PEM file of that certificate's key; a node config's client-key comes first."""
    proxy: str = "environment"
    """HTTP proxy to a trunk off loopback: environment (https_proxy and no_proxy), none, or
    http://host:port; a node config's trunk-proxy comes first."""
    train: str = "lora"
    """What trains: lora, or full (every trunk weight)."""
    step_every: str = "local-step"
    """When the trunk steps: local-step, server-round or contribution."""
    quorum: float = 1.0
    """Share of the participants whose contributions a window needs, in (0, 1]."""
    quorum_count: int = 0
    """The same as a number of clients; 0: trunk.quorum decides."""
    window_rule: str = "quorum"
    """Whether a window that meets the quorum goes on without who has left: quorum (it does), a
    plug-in's name, or an import path."""
    window_batches: str = "off"
    """Whether the trunk computes the clients' micro-batches of one place in a window as one batch, in
    slot order: on, or off (each alone)."""
    window_batch_positions: int = 8192
    """Rows times positions of one pass of such a batch, padding included; more take several passes."""
    join_timeout: float = 120.0
    """Seconds from the round's start until every participant must have joined."""
    window_timeout: float = 120.0
    """Seconds from a window's opening until it must be complete."""
    call_timeout: float = 150.0
    """Seconds that a client waits for one call, retries included."""
    first_frame_timeout: float = 20.0
    """Seconds from a call's arrival until its first frame has."""
    activation_memory: float = 4.0
    """GiB of saved activations, over all clients."""
    activation_memory_per_client: float = 0.0
    """GiB of saved activations of one client; 0: an equal share."""
    max_calls_in_flight: int = 32
    """Calls that one client may have in progress at the trunk."""
    max_connections: int = 512
    """Connections that the trunk's port has open at once, of everybody; one more is closed."""
    stream_window: int = 131072
    """Bytes that a call may send before the trunk reads them; more is faster over distant links."""
    call_memory_per_client: float = 1.0
    """GiB of tensors of one client's calls in progress, as announced and as decoded."""
    max_call_positions: int = 262144
    """Rows times positions of one call."""
    max_evaluations: int = 0
    """Evaluations of one client in a training round; evaluation rounds take any number."""
    max_compute_seconds: float = 0.0
    """Seconds that one client's calls may compute in a round; 0: no limit."""
    held_memory_per_client: float = 4.0
    """GiB kept for one client: unacknowledged replies, early gradients; its key-value caches."""
    cache_memory: float = 1.0
    """GiB of key-value caches of generation, over all clients."""
    snapshot_memory: float = 1.0
    """GiB of former weights that clients still work on (fedbuff)."""
    max_experiments: int = 1
    """Experiments that a running trunk serves at once, over one base in memory; the memory budgets are
    each one's."""
    experiment_lease: float = 600.0
    """Seconds without a word of its coordinator after which one of several is let go; its committed
    rounds stay on disk."""
    experiment_memory: float = 2.0
    """GiB of what one of several trains: weights, optimizer, and the copies that a round goes back
    to."""
    max_client_grad_norm: float = 0.0
    """L2 norm that one client's trunk gradient is clipped to; 0: no clipping."""
    outlier_factor: float = 20.0
    """How many times the median of a window's gradient norms one client's may be, among three or more;
    0: any."""
    on_bad_client: str = "exclude"
    """A client whose gradient may not count: exclude (as the quorum allows) or abort the round."""
    reduction: str = "mean"
    """How clients' gradients are reduced: mean (by tokens), or rules such as trimmed-mean=0.2."""
    wire_dtype: str = "native"
    """Codec of the activations on the wire: native (as they are), float32, bfloat16, int8 (groups of 64
    with outlier channels in bfloat16), or a plug-in's name."""
    gradient_wire_dtype: str = ""
    """Codec of their gradients, as trunk.wire-dtype; empty: the same codec."""
    transport: str = "auto"
    """What carries the clients' calls: auto (shared memory where client and trunk share host and user,
    else gRPC), grpc, shared-memory, or a plug-in's name."""
    device: str = "auto"
    """Device of the trunk: auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    device_map: str = ""
    """Layers over this host's GPUs: auto, balanced, balanced_low_0 or sequential; empty: one
    device."""
    replicas: int = 1
    """Processes that compute the trunk, each with all its layers on a device of its own (cuda:0, cuda:1,
    ...; or all on the CPU); they share every window batch."""
    tensor_parallel: int = 1
    """Processes that divide every layer of the trunk, each on a device of its own (cuda:0, cuda:1, ...; or
    all on the CPU), and compute every call together."""
    compute: str = "exact"
    """How the trunk computes: exact (the unsplit model's own operations; equal bits on a CPU), or fast
    (compiled layers, 16-bit autocast where the base has 16 bits; other last bits, which may depend on
    the shapes that a process meets first)."""
    num_threads: int = 1
    """torch's intra-op CPU threads; pinned, so that sums are repeatable."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The trunk's optimizer."""

    def quorum_of(self, num_participants: int) -> float:
        """Return the share of ``num_participants`` that a window needs, by share or by count."""
        if self.quorum_count:
            return min(1.0, self.quorum_count / num_participants)
        return self.quorum

    @property
    def processes(self) -> int:
        """Return how many processes compute the trunk."""
        return max(self.replicas, self.tensor_parallel)

    @property
    def batch_positions(self) -> int:
        """Rows times positions of one pass of a window batch; 0: there are none."""
        return self.window_batch_positions if self.window_batches == "on" else 0

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        one_of("trunk.train", self.train, ("lora", "full"))
        one_of("trunk.step-every", self.step_every, STEP_EVERY)
        plug_in_name("trunk.wire-dtype", self.wire_dtype)
        plug_in_name("trunk.gradient-wire-dtype", self.gradient_wire_dtype or self.wire_dtype)
        plug_in_name("trunk.transport", self.transport)
        plug_in_name("trunk.window-rule", self.window_rule)
        one_of("trunk.window-batches", self.window_batches, WINDOW_BATCHES)
        one_of("trunk.on-bad-client", self.on_bad_client, ON_BAD_CLIENT)
        for check in (self._check_device_map, self._check_replicas, self._check_tensor_parallel):
            check()
        share("trunk.quorum", self.quorum)
        for name in (
            "quorum_count",
            "activation_memory_per_client",
            "max_client_grad_norm",
            "outlier_factor",
            "max_evaluations",
            "max_compute_seconds",
        ):
            at_least(f"trunk.{kebab(name)}", getattr(self, name), 0)
        for name in (
            "join_timeout",
            "window_timeout",
            "call_timeout",
            "first_frame_timeout",
            "activation_memory",
            "call_memory_per_client",
            "held_memory_per_client",
            "cache_memory",
            "snapshot_memory",
            "experiment_lease",
            "experiment_memory",
        ):
            above(f"trunk.{kebab(name)}", getattr(self, name), 0)
        for name in (
            "num_threads",
            "max_calls_in_flight",
            "max_connections",
            "max_call_positions",
            "window_batch_positions",
            "max_experiments",
            "replicas",
            "tensor_parallel",
        ):
            at_least(f"trunk.{kebab(name)}", getattr(self, name), 1)
        if not MIN_STREAM_WINDOW <= self.stream_window <= MAX_STREAM_WINDOW:
            raise ConfigError(
                f"trunk.stream-window must be {MIN_STREAM_WINDOW} to {MAX_STREAM_WINDOW} bytes; it is "
                f"{self.stream_window}."
            )
        one_of("trunk.compute", self.compute, COMPUTE_MODES)
        if bool(self.client_certificate) != bool(self.client_key):
            raise ConfigError(
                "trunk.client-certificate and trunk.client-key belong together; only one is named."
            )
        if self.address:
            check_address("trunk.address", self.address)
        check_proxy("trunk.proxy", self.proxy)

    def _check_device_map(self) -> None:
        """Check what a device map goes together with."""
        if not self.device_map:
            return
        check_device_map("trunk", self.device_map, self.device)
        if self.max_experiments > 1:
            raise ConfigError(
                "trunk.max-experiments serves several experiments on one device, and trunk.device-map "
                f"= {self.device_map!r} places layers on several. Leave one of them out."
            )

    def _check_replicas(self) -> None:
        """Check what replicas go together with."""
        if self.replicas <= 1:
            return
        given = f"trunk.replicas = {self.replicas}"
        if self.window_batches == "off":
            raise ConfigError(
                f'{given} divides the clients of a window batch, and trunk.window-batches = "off" has '
                'none. Set it to "on"; with trunk.window-batch-positions = 1 each micro-batch is still '
                "computed alone, those of different clients at the same time."
            )
        if self.device_map:
            raise ConfigError(
                f"{given} holds all layers on one device in each process, and trunk.device-map = "
                f"{self.device_map!r} places them on several. Leave one of them out."
            )
        if self.max_experiments > 1:
            raise ConfigError(
                f"{given} computes for one experiment, and trunk.max-experiments = "
                f"{self.max_experiments} takes turns on one device. Leave one of them out."
            )

    def _check_tensor_parallel(self) -> None:
        """Check what divided layers go together with."""
        if self.tensor_parallel <= 1:
            return
        given = f"trunk.tensor-parallel = {self.tensor_parallel}"
        others = {
            f"trunk.replicas = {self.replicas}": self.replicas > 1,
            f"trunk.device-map = {self.device_map!r}": bool(self.device_map),
            f"trunk.max-experiments = {self.max_experiments}": self.max_experiments > 1,
            'trunk.train = "full"': self.train == "full",
        }
        for other, there in others.items():
            if there:
                raise ConfigError(
                    f"{given} divides the layers of one trunk with LoRA over processes, which does not go "
                    f"together with {other}. Leave one of them out."
                )
