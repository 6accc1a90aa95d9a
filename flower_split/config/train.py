"""What a client does in a round, and optimizers."""

from dataclasses import dataclass, field

from flower_split.config.validation import above, at_least, kebab, one_of, plug_in_name
from flower_split.errors import ConfigError

OPTIMIZERS = ("adamw", "adam", "sgd")
MAX_GRAD_NORM_OVER = ("auto", "model", "part")
COMPUTE_MODES = ("exact", "fast")
SYNC = ("rounds", "gradients")
OPTIMIZER_STATES = ("auto", "reset", "keep")
CLIENT_WORKERS = ("auto", "off")
RATE_SCALES = ("auto", "none", "sqrt-clients")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # as transformers names them


def check_device_map(part: str, device_map: str, device: str) -> None:
    """Check a device map that is set, and that no device is named beside it.

    Args:
        part: The keys' first name: train, or trunk.
        device_map: The value of its key.
        device: That of the key beside it.

    Raises:
        ConfigError: The map has no such name, or a device is named.
    """
    one_of(f"{part}.device-map", device_map, DEVICE_MAPS)
    if device != "auto":
        raise ConfigError(
            f"{part}.device-map places layers on this host's GPUs, so {part}.device must stay "
            f'"auto"; it is {device!r}.'
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """An optimizer, its learning-rate schedule over the whole run, and gradient clipping."""

    name: str = "adamw"
    """Optimizer of torch.optim: adamw, adam or sgd."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay, as the optimizer defines it."""
    max_grad_norm: float = 1.0
    """L2 norm that gradients are clipped to; 0: no clipping. Over which parameters:
    train.max-grad-norm-over."""
    schedule: str = "constant"
    """Learning-rate schedule, by a name of transformers' get_scheduler."""
    warmup_ratio: float = 0.0
    """Share of all optimizer steps of the run that warm up, in [0, 1)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        one_of("*.optimizer.name", self.name, OPTIMIZERS)
        above("*.optimizer.learning-rate", self.learning_rate, 0)
        at_least("*.optimizer.weight-decay", self.weight_decay, 0)
        at_least("*.optimizer.max-grad-norm", self.max_grad_norm, 0)
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(
                f"*.optimizer.warmup-ratio must be in [0, 1); it is {self.warmup_ratio!r}."
            )
        if self.warmup_ratio and self.schedule == "constant":
            raise ConfigError(
                f"*.optimizer.warmup-ratio is {self.warmup_ratio!r}, and the schedule "
                f'"{self.schedule}" does not warm up. Set *.optimizer.schedule = '
                '"constant_with_warmup", or warmup-ratio = 0.'
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What a client does in one round."""

    local_steps: int = 20
    """Optimizer steps per round; 0: use local-epochs."""
    local_epochs: int = 0
    """Passes over the client's data per round; 0: use local-steps."""
    batch_size: int = 8
    """Sequences per micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    micro_batches_in_flight: int = 2
    """Micro-batches of one optimizer step that are on the wire at once."""
    sequence_length: int = 128
    """Tokens per sequence; longer examples are cut."""
    device: str = "auto"
    """Device of the client: auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    device_map: str = ""
    """The client's own modules over this host's GPUs: auto, balanced, balanced_low_0 or sequential; empty:
    one device."""
    compute: str = "exact"
    """How the client computes: exact (the unsplit model's own operations; equal bits on a CPU), or fast
    (compiled layers, 16-bit autocast where the base has 16 bits; other last bits, which may depend on
    the shapes that a process meets first)."""
    num_threads: int = 1
    """torch's intra-op CPU threads; pinned, so that sums are repeatable."""
    max_grad_norm_over: str = "part"
    """What max-grad-norm is the norm of: model (bottom, trunk and top together, as an unsplit model
    clips), part (each by itself), or auto (model where the settings allow it)."""
    sync: str = "rounds"
    """When the clients' adapters are the same: rounds (averaged after each), or gradients (in every
    optimizer step all clients take the mean of their gradients, which the trunk then sees)."""
    optimizer_state: str = "auto"
    """Of a client's optimizer, at the start of a round: reset (a new one), keep (as its last committed
    round left it, on the client's own disk; always so with sync = gradients), or auto (keep where
    lora-fedavg averages A and B: fedit and ffa-lora)."""
    rate_scale: str = "auto"
    """Factor on the clients' learning rate: none (1), sqrt-clients (the square root of how many clients
    a round averages, as they weigh), or auto (sqrt-clients for Adam and AdamW, where lora-fedavg
    averages A and B and the optimizer's state is kept)."""
    proximal_mu: float = 0.0
    """Weight of FedProx's pull to the round's first weights; strategy.options may set it too."""
    auxiliary_head: bool = False
    """In mode forward-only: train the bottom with a local head and loss."""
    client_dir: str = ""
    """Directory of what a client keeps (private factors, optimizer state); empty: in the run directory
    if simulated, else in Flower's home."""
    client_worker: str = "auto"
    """Who answers a node's messages in a deployment: auto (a worker on the node, which keeps model and
    data for the run), or off (a new process for each)."""
    report_to: str = ""
    """Where the ServerApp tells metrics beside metrics.jsonl, as "name, name": tensorboard, wandb, mlflow
    (extras of the same names), a plug-in's name, or an import path; empty: nowhere."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The clients' optimizer."""

    @property
    def loggers(self) -> tuple[str, ...]:
        """Return the names in ``report_to``."""
        return tuple(filter(None, (name.strip() for name in self.report_to.split(","))))

    def __post_init__(self) -> None:
        """Check ranges and that exactly one of local-steps and local-epochs is used."""
        one_of("train.compute", self.compute, COMPUTE_MODES)
        if self.device_map:
            check_device_map("train", self.device_map, self.device)
        for name in self.loggers:
            plug_in_name("train.report-to", name)
        for name in ("local_steps", "local_epochs"):
            at_least(f"train.{kebab(name)}", getattr(self, name), 0)
        if (self.local_steps > 0) == (self.local_epochs > 0):
            raise ConfigError(
                "exactly one of train.local-steps and train.local-epochs must be above 0; they are "
                f"{self.local_steps} and {self.local_epochs}. Set the one you do not use to 0."
            )
        for name in (
            "batch_size",
            "gradient_accumulation_steps",
            "micro_batches_in_flight",
            "num_threads",
        ):
            at_least(f"train.{kebab(name)}", getattr(self, name), 1)
        one_of("train.max-grad-norm-over", self.max_grad_norm_over, MAX_GRAD_NORM_OVER)
        one_of("train.client-worker", self.client_worker, CLIENT_WORKERS)
        one_of("train.sync", self.sync, SYNC)
        one_of("train.optimizer-state", self.optimizer_state, OPTIMIZER_STATES)
        one_of("train.rate-scale", self.rate_scale, RATE_SCALES)
        at_least("train.proximal-mu", self.proximal_mu, 0)
        at_least("train.sequence-length", self.sequence_length, 2)
