"""The run's configuration: frozen dataclasses, parsed once at the edge and passed down.

A field ``trunk.optimizer.learning_rate`` is the run-config key ``trunk.optimizer.learning-rate``.
Every rule that a value must keep is checked on construction; nothing below reads the environment.
"""

import difflib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from flower_split.errors import ConfigError

Scalar = bool | int | float | str

MODES = ("joint", "frozen", "forward-only")
STEP_EVERY = ("local-step", "server-round", "contribution")
DTYPES = ("float32", "bfloat16", "float16")
WIRE_DTYPES = ("native", "float32", "bfloat16")
OPTIMIZERS = ("adamw", "adam", "sgd")
LORA_INITS = ("kaiming", "gaussian")
DATA_SOURCES = ("stdlib-docs", "text", "jsonl", "hub")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}; it is {value!r}.")


def _at_least(key: str, value: float, minimum: float) -> None:
    if not value >= minimum:
        raise ConfigError(f"{key} must be at least {minimum}; it is {value!r}.")


def _above(key: str, value: float, bound: float) -> None:
    if not value > bound:
        raise ConfigError(f"{key} must be above {bound}; it is {value!r}.")


def _share(key: str, value: float, *, zero: bool = False) -> None:
    if not (0 < value <= 1 or (zero and value == 0)):
        raise ConfigError(f"{key} must be in {'[' if zero else '('}0, 1]; it is {value!r}.")


def _pattern(key: str, text: str) -> dict[str, float]:
    """``"name=value, name=value"`` as a mapping."""
    values: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        try:
            values[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                f'{key} must read "name=value, name=value"; {item!r} in it does not.'
            ) from None
        _above(key, values[name.strip()], 0)
    return values


def _longest(values: Mapping[str, float], module: str) -> float | None:
    """The value of the longest name that ``module`` is, or ends with after a dot."""
    names = [name for name in values if module == name or module.endswith("." + name)]
    return values[max(names, key=len)] if names else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The base model and where it is cut."""

    name: str = "quickstart"  # "quickstart" (in the package), a local directory, or a hub id
    revision: str = ""  # hub revision; empty: the default branch
    first_cut: int = 2  # the bottom is layers [0, first_cut)
    second_cut: int = 6  # the trunk is layers [first_cut, second_cut); the top is the rest
    dtype: str = "float32"  # dtype of the base weights and of the activations
    attn_implementation: str = ""  # transformers' name; empty: the model's default

    def __post_init__(self) -> None:
        """Check the rules that need no model."""
        if not self.name:
            raise ConfigError("model.name must not be empty: a local directory or a hub id.")
        _at_least("model.first-cut", self.first_cut, 0)
        if self.second_cut <= self.first_cut:
            raise ConfigError(
                "model.second-cut must be above model.first-cut, or the trunk has no layer; "
                f"they are {self.second_cut} and {self.first_cut}."
            )
        _one_of("model.dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraPartConfig:
    """LoRA of one part (bottom, trunk or top), as PEFT's ``LoraConfig`` names it."""

    r: int = 8  # rank; 0: this part has no LoRA
    alpha: float = 16.0  # ΔW = alpha / r · B @ A (alpha / sqrt(r) with use_rslora)
    dropout: float = 0.0  # probability, on the input of A
    target_modules: str = (
        "all-linear"  # PEFT's rule: "all-linear", or comma-separated name suffixes
    )
    use_rslora: bool = False
    rank_pattern: str = (
        ""  # "name=rank, ...": other ranks, by name suffix; the longest match counts
    )
    alpha_pattern: str = ""  # "name=alpha, ...": other alphas, in the same way
    init: str = "kaiming"  # of A, where B is zero: PEFT's kaiming (uniform) or gaussian

    def __post_init__(self) -> None:
        """Check ranges."""
        _at_least("lora.*.r", self.r, 0)
        _above("lora.*.alpha", self.alpha, 0)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.*.dropout must be in [0, 1); it is {self.dropout!r}.")
        _one_of("lora.*.init", self.init, LORA_INITS)
        for name, rank in self.ranks.items():
            if rank != int(rank):
                raise ConfigError(
                    f"lora.*.rank-pattern gives {name} the rank {rank}; use integers."
                )
        if self.r == 0 and self.rank_pattern:
            raise ConfigError(
                "lora.*.r is 0, so the part has no LoRA, but lora.*.rank-pattern is set. Set r."
            )

    @property
    def ranks(self) -> dict[str, float]:
        """Name suffix -> rank, of ``rank_pattern``."""
        return _pattern("lora.*.rank-pattern", self.rank_pattern)

    @property
    def alphas(self) -> dict[str, float]:
        """Name suffix -> alpha, of ``alpha_pattern``."""
        return _pattern("lora.*.alpha-pattern", self.alpha_pattern)

    def setting_of(self, module: str) -> tuple[int, float]:
        """``(rank, alpha)`` of a module, by its unsplit name."""
        rank, alpha = _longest(self.ranks, module), _longest(self.alphas, module)
        return (self.r if rank is None else int(rank), self.alpha if alpha is None else alpha)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfigs:
    """LoRA settings, separately for each part."""

    bottom: LoraPartConfig = field(default_factory=LoraPartConfig)
    trunk: LoraPartConfig = field(default_factory=LoraPartConfig)
    top: LoraPartConfig = field(default_factory=LoraPartConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """An optimizer, its learning-rate schedule over the whole run, and gradient clipping."""

    name: str = "adamw"  # adamw, adam or sgd (torch.optim, foreach off)
    learning_rate: float = 2e-3  # peak, in the units of the optimizer
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # L2 norm over all parameters of the part; 0: no clipping
    schedule: str = "constant"  # a name of transformers' get_scheduler
    warmup_ratio: float = 0.0  # share of all optimizer steps of the run

    def __post_init__(self) -> None:
        """Check ranges."""
        _one_of("*.optimizer.name", self.name, OPTIMIZERS)
        _above("*.optimizer.learning-rate", self.learning_rate, 0)
        _at_least("*.optimizer.weight-decay", self.weight_decay, 0)
        _at_least("*.optimizer.max-grad-norm", self.max_grad_norm, 0)
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(
                f"*.optimizer.warmup-ratio must be in [0, 1); it is {self.warmup_ratio!r}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What a client does in one round."""

    local_steps: int = 20  # optimizer steps per round; 0: use local-epochs
    local_epochs: int = 0  # passes over the client's data per round; 0: use local-steps
    batch_size: int = 8  # sequences per micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    micro_batches_in_flight: int = 2  # of one optimizer step, at once on the wire
    sequence_length: int = 128  # tokens; longer examples are cut
    device: str = "auto"  # "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", ...
    num_threads: int = 1  # torch's intra-op CPU threads; pinned, so that sums are repeatable
    auxiliary_head: bool = False  # forward-only mode: train the bottom with a local head and loss
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        """Check ranges and that exactly one of local-steps and local-epochs is used."""
        for name in ("local_steps", "local_epochs"):
            _at_least(f"train.{_kebab(name)}", getattr(self, name), 0)
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
            _at_least(f"train.{_kebab(name)}", getattr(self, name), 1)
        _at_least("train.sequence-length", self.sequence_length, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkConfig:
    """The trunk server: where it is, how it steps, how long it waits."""

    address: str = ""  # host:port of a running trunk; empty: the ServerApp starts one on loopback
    token_file: str = ""  # file with the coordinator token of a running trunk
    root_certificates: str = ""  # PEM file of the CA for TLS; empty: plain text, loopback only
    train: str = "lora"  # "lora", or "full": every trunk weight trains
    step_every: str = "local-step"  # local-step, server-round or contribution
    quorum: float = 1.0  # share of the participants whose contributions a window needs
    quorum_count: int = 0  # the same as a number of clients; 0: trunk.quorum decides
    join_timeout: float = 120.0  # seconds from the round's start until every participant joined
    window_timeout: float = 120.0  # seconds from a window's opening until it is complete
    call_timeout: float = 150.0  # seconds a client waits for one call, retries included
    activation_memory: float = 4.0  # GiB of saved activations, over all clients
    activation_memory_per_client: float = 0.0  # GiB of one client; 0: an equal share of it
    cache_memory: float = 1.0  # GiB of key-value caches of generation, over all clients
    max_client_grad_norm: float = 0.0  # L2 norm of one client's trunk gradient; 0: no clipping
    reduction: str = (
        "mean"  # over clients: mean (by tokens), or robust rules: trimmed-mean=0.2, ...
    )
    wire_dtype: str = "native"  # dtype of the activations on the wire: native, float32 or bfloat16
    device: str = "auto"
    num_threads: int = 1  # torch's intra-op CPU threads; pinned, so that sums are repeatable
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def quorum_of(self, num_participants: int) -> float:
        """The share of ``num_participants`` that a window needs, by share or by count."""
        if self.quorum_count:
            return min(1.0, self.quorum_count / num_participants)
        return self.quorum

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        _one_of("trunk.train", self.train, ("lora", "full"))
        _one_of("trunk.step-every", self.step_every, STEP_EVERY)
        _one_of("trunk.wire-dtype", self.wire_dtype, WIRE_DTYPES)
        _share("trunk.quorum", self.quorum)
        _at_least("trunk.quorum-count", self.quorum_count, 0)
        for name in ("activation_memory_per_client", "max_client_grad_norm"):
            _at_least(f"trunk.{_kebab(name)}", getattr(self, name), 0)
        for name in (
            "join_timeout",
            "window_timeout",
            "call_timeout",
            "activation_memory",
            "cache_memory",
        ):
            _above(f"trunk.{_kebab(name)}", getattr(self, name), 0)
        _at_least("trunk.num-threads", self.num_threads, 1)
        if self.address and ":" not in self.address:
            raise ConfigError(f"trunk.address must be host:port; it is {self.address!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Each client's text, and how one data set is split over simulated clients."""

    source: str = "stdlib-docs"  # stdlib-docs, text, jsonl or hub
    path: str = ""  # text / jsonl: a file or directory; may contain {partition_id}
    dataset: str = ""  # hub: the data set's id, or a local directory that datasets can load
    subset: str = ""  # hub: the data set's configuration
    split: str = "train"  # hub
    text_field: str = "text"  # hub / jsonl: the field that holds the text
    partitioner: str = "iid"  # of flwr-datasets, or "none": every client reads all of its own file
    partition_by: str = ""  # the column of dirichlet, natural-id and shard
    dirichlet_alpha: float = 0.5  # smaller: more unequal
    eval_fraction: float = 0.2  # share of a client's examples held out
    max_eval_batches: int = 0  # per evaluation and client; 0: all

    def __post_init__(self) -> None:
        """Check choices, ranges and that the source has what it needs."""
        _one_of("data.source", self.source, DATA_SOURCES)
        if self.source in ("text", "jsonl") and not self.path:
            raise ConfigError(
                f'data.path must name a file or directory for source "{self.source}".'
            )
        if self.source == "hub" and not self.dataset:
            raise ConfigError('data.dataset must name the data set for source "hub".')
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(
                f"data.eval-fraction must be between 0 and 1; it is {self.eval_fraction!r}."
            )
        _above("data.dirichlet-alpha", self.dirichlet_alpha, 0)
        _at_least("data.max-eval-batches", self.max_eval_batches, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategyConfig:
    """How the clients' adapters become the next global adapter."""

    aggregator: str = "product-delta"  # a name of flower_split.aggregation
    weighting: str = "tokens"  # a client's weight: label tokens, examples, or uniform
    server_learning_rate: float = 1.0  # on the aggregated delta

    def __post_init__(self) -> None:
        """Check choices and ranges; the aggregator's name is checked where they are made."""
        _one_of("strategy.weighting", self.weighting, ("tokens", "examples", "uniform"))
        _above("strategy.server-learning-rate", self.server_learning_rate, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything a run needs; equal configs and seeds give equal runs."""

    seed: int = 0
    mode: str = "joint"  # joint, frozen or forward-only
    num_server_rounds: int = 3
    num_clients: int = 4  # SuperNodes that must be there before round 1
    fraction_train: float = 1.0  # share of the clients that train in a round, seeded
    fraction_evaluate: float = 1.0  # share of the clients that evaluate after a round; 0: none
    join_timeout: float = 180.0  # seconds to wait for num-clients SuperNodes
    round_timeout: float = 1800.0  # seconds for one training or evaluation phase
    run_dir: str = ""  # where the run's artifacts go; empty: runs/<time>-<id> where flwr runs
    round_retries: int = 2  # how often a round is tried again after a process was lost
    resume: str = ""  # a run directory to go on with after its last committed round; empty: new run
    resume_previous: bool = False  # with resume: go on from the committed round before the last
    local_only_baseline: bool = False  # also train every client alone, for comparison
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfigs = field(default_factory=LoraConfigs)
    train: TrainConfig = field(default_factory=TrainConfig)
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    data: DataConfig = field(default_factory=DataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)

    def __post_init__(self) -> None:
        """Check choices, ranges, and rules that span sections."""
        _one_of("mode", self.mode, MODES)
        _at_least("num-server-rounds", self.num_server_rounds, 1)
        _at_least("num-clients", self.num_clients, 1)
        _at_least("round-retries", self.round_retries, 0)
        if self.resume_previous and not self.resume:
            raise ConfigError("resume-previous needs resume: the run directory to go on with.")
        _share("fraction-train", self.fraction_train)
        _share("fraction-evaluate", self.fraction_evaluate, zero=True)
        _above("join-timeout", self.join_timeout, 0)
        _above("round-timeout", self.round_timeout, 0)
        if self.train.auxiliary_head and self.mode != "forward-only":
            raise ConfigError(
                "train.auxiliary-head trains the bottom where no gradient arrives, in mode "
                f'"forward-only"; the mode is {self.mode!r}.'
            )
        if self.mode == "joint" and self.trunk.train == "lora" and self.lora.trunk.r == 0:
            raise ConfigError(
                'mode "joint" trains the trunk, but lora.trunk.r is 0 and trunk.train is "lora". '
                'Set lora.trunk.r, or trunk.train = "full", or mode = "frozen".'
            )
        if self.lora.top.r == 0 and self.lora.bottom.r == 0:
            raise ConfigError(
                "lora.bottom.r and lora.top.r are both 0: a client would have nothing to train."
            )


def _kebab(name: str) -> str:
    return name.replace("_", "-")


Section = TypeVar("Section")


def _leaves(section: type, prefix: str = "") -> Iterator[tuple[str, type, Any]]:
    """Every key with its type and default, depth first in field order."""
    hints = typing.get_type_hints(section)
    for item in fields(section):
        key, hint = prefix + _kebab(item.name), hints[item.name]
        if is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), key + ".")
        else:
            yield key, hint, item.default


def run_config_keys() -> dict[str, Scalar]:
    """Every run-config key with its default, as an app's ``[tool.flwr.app.config]`` may hold."""
    return {key: default for key, _, default in _leaves(RunConfig) if default is not MISSING}


def _coerce(key: str, value: Scalar, kind: type) -> Scalar:
    """``value`` as ``kind``; an int is taken where a float is wanted, nothing else converts."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key} must be of type {kind.__name__}; it is {value!r}.")
    return value


def _build(section: type[Section], values: Mapping[str, Scalar], prefix: str = "") -> Section:
    hints = typing.get_type_hints(section)
    arguments: dict[str, Any] = {}
    for item in fields(typing.cast(Any, section)):
        key, hint = prefix + _kebab(item.name), hints[item.name]
        if is_dataclass(hint):
            arguments[item.name] = _build(typing.cast(type, hint), values, key + ".")
        elif key in values:
            arguments[item.name] = _coerce(key, values[key], hint)
    return section(**arguments)


# PEFT's options that a part cannot have, and why.
_REFUSED_LORA = {
    "use-dora": "DoRA's magnitudes are norms of the base weights plus each client's own update: their "
    "mean is not the magnitude of the mean, so they cannot be aggregated",
    "modules-to-save": "whole modules would have to be read from the base weights by the ServerApp, "
    'which holds none. Use LoRA on them (target-modules), or trunk.train = "full" for the trunk',
    "bias": "biases of the base would have to be read from the base weights by the ServerApp, which "
    "holds none",
    "init-lora-weights": "initial values that need base weights or data (pissa, olora, loftq, eva, "
    "corda) are not known to the ServerApp, which holds none. Use lora.*.init: kaiming or gaussian",
    "layer-replication": "replicated layers would change the layers' indices, by which the model is cut",
    "use-qalora": "its factors do not have the shape that aggregation needs",
    "lora-bias": "biases of B are not aggregated by every method",
    "trainable-token-indices": "new token rows would have to be read from the base weights",
}


def _refuse_peft_option(key: str) -> None:
    """Say why a part cannot have this option of PEFT's, if it is one."""
    group, _, name = key.rpartition(".")
    if group in ("lora.bottom", "lora.trunk", "lora.top") and name in _REFUSED_LORA:
        raise ConfigError(f"{key} is not supported: {_REFUSED_LORA[name]}.")


def parse_run_config(run_config: Mapping[str, Scalar]) -> RunConfig:
    """Parse Flower's flat run config.

    Args:
        run_config: Keys in kebab-case with dots between groups, such as ``context.run_config``.

    Raises:
        ConfigError: A key is unknown (the nearest known one is named), a value has the wrong type,
            or breaks its rule.
    """
    known = [key for key, _, _ in _leaves(RunConfig)]
    for key in run_config:
        if key not in known:
            _refuse_peft_option(key)
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown run-config key {key!r}.{hint}")
    return _build(RunConfig, run_config)


def resolved_run_config(config: RunConfig) -> dict[str, Scalar]:
    """``config`` as flat run-config keys: the inverse of :func:`parse_run_config`."""

    def flatten(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Scalar]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{_kebab(name)}.")
            else:
                yield prefix + _kebab(name), value

    return dict(flatten(asdict(config), ""))
