"""LoRA of the three parts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from flower_split.config.validation import above, at_least, longest, one_of, pattern
from flower_split.errors import ConfigError

CLIENT_SCALES = ("alpha", "scale")
LORA_INITS = ("kaiming", "gaussian", "orthogonal", "random")
HEAD = "head"  # in modules-to-save: whatever the task has put on top of the base model
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraPartConfig:
    """What trains of one part (bottom, trunk or top), as PEFT's ``LoraConfig`` names it."""

    train: str = "lora"
    """What trains: lora, or full (every weight of the bottom or top; nothing below counts)."""
    r: int = 8
    """Rank; 0: this part has no LoRA."""
    alpha: float = 16.0
    """Numerator of the scale: ΔW = alpha / r · B A (alpha / sqrt(r) with use-rslora)."""
    dropout: float = 0.0
    """Probability of dropout on the input of A, in [0, 1)."""
    target_modules: str = "all-linear"
    """Modules that get LoRA, by PEFT's rule: all-linear, or name suffixes separated by commas."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), as rank-stabilized LoRA does."""
    rank_pattern: str = ""
    """Other ranks by name suffix, as "name=rank, ..."; the longest match counts."""
    alpha_pattern: str = ""
    """Other alphas by name suffix, as "name=alpha, ..."; the longest match counts."""
    init: str = "kaiming"
    """Initial values by PEFT's rules: kaiming or gaussian (A; B is zero), orthogonal (both; ΔW is
    zero), or random (both; ΔW is not zero)."""
    use_dora: bool = False
    """Train a magnitude per output as well (weight-decomposed LoRA)."""
    bias: str = "none"
    """Which biases of the base train: none, all, or lora_only."""
    modules_to_save: str = ""
    """Modules that train whole, as name suffixes separated by commas; head: those that the task has put
    on top (of the top, where model.task has such a head, without being named)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("lora.*.r", self.r, 0)
        above("lora.*.alpha", self.alpha, 0)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.*.dropout must be in [0, 1); it is {self.dropout!r}.")
        one_of("lora.*.init", self.init, LORA_INITS)
        one_of("lora.*.train", self.train, ("lora", "full"))
        one_of("lora.*.bias", self.bias, BIASES)
        self._check_combinations()
        for name, rank in self.ranks.items():
            if rank != int(rank):
                raise ConfigError(
                    f"lora.*.rank-pattern gives {name} the rank {rank}; use integers."
                )
        if self.r == 0 and self.rank_pattern:
            raise ConfigError(
                "lora.*.r is 0, so the part has no LoRA, but lora.*.rank-pattern is set. Set r."
            )

    def _check_combinations(self) -> None:
        """Refuse settings that would have no effect."""
        needs_lora = {"use-dora": self.use_dora, 'bias = "lora_only"': self.bias == "lora_only"}
        for key, is_set in needs_lora.items():
            if is_set and self.r == 0:
                raise ConfigError(
                    f"lora.*.{key} is of the modules with LoRA, and lora.*.r is 0: there are none. "
                    "Set r."
                )
        beside_lora = needs_lora | {
            "bias": self.bias != "none",
            "modules-to-save": bool(self.modules_to_save),
        }
        for key, is_set in beside_lora.items():
            if is_set and self.train == "full":
                raise ConfigError(
                    f'lora.*.train is "full", so every weight of the part trains, and lora.*.{key} '
                    "says nothing more. Leave it out."
                )

    @property
    def adapts(self) -> bool:
        """Whether anything of the part trains."""
        return (
            self.train == "full" or self.r > 0 or self.bias == "all" or bool(self.modules_to_save)
        )

    @property
    def has_lora(self) -> bool:
        """Whether the part gets LoRA."""
        return self.train == "lora" and self.r > 0

    @property
    def saved_modules(self) -> list[str]:
        """The name suffixes of ``modules_to_save``."""
        return [name.strip() for name in self.modules_to_save.split(",") if name.strip()]

    @property
    def ranks(self) -> dict[str, float]:
        """Name suffix -> rank, of ``rank_pattern``."""
        return pattern("lora.*.rank-pattern", self.rank_pattern)

    @property
    def alphas(self) -> dict[str, float]:
        """Name suffix -> alpha, of ``alpha_pattern``."""
        return pattern("lora.*.alpha-pattern", self.alpha_pattern)

    def setting_of(self, module: str) -> tuple[int, float]:
        """Return ``(rank, alpha)`` of a module, by its unsplit name."""
        rank, alpha = longest(self.ranks, module), longest(self.alphas, module)
        return (self.r if rank is None else int(rank), self.alpha if alpha is None else alpha)

    def scale_of(self, module: str) -> float:
        """Return the scale of ΔW of a module, by its unsplit name."""
        rank, alpha = self.setting_of(module)
        return alpha / (rank**0.5 if self.use_rslora else rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfigs:
    """LoRA settings, separately for each part, and which clients have a smaller rank.

    A client's own rank replaces ``r`` of the parts it holds where it is below; see
    :mod:`flower_split.parties.client_ranks`.
    """

    bottom: LoraPartConfig = field(default_factory=LoraPartConfig)
    """The bottom's LoRA."""
    trunk: LoraPartConfig = field(default_factory=LoraPartConfig)
    """The trunk's LoRA."""
    top: LoraPartConfig = field(default_factory=LoraPartConfig)
    """The top's LoRA."""
    rank_by_memory: str = ""
    """Smaller ranks by a node's memory in GiB, as "GiB=rank, ..."; the first bound that the node is
    within counts."""
    rank_by_partition: str = ""
    """Smaller ranks by data partition, as "partition=rank, ..."; for simulations."""
    client_scale: str = "alpha"
    """What a client of smaller rank keeps: alpha (so its scale is alpha over its own rank), or
    scale."""

    def __post_init__(self) -> None:
        """Check that there is one way to say how the trunk trains, and the clients' ranks."""
        one_of("lora.client-scale", self.client_scale, CLIENT_SCALES)
        for key, ranks in (
            ("lora.rank-by-memory", self.ranks_by_memory),
            ("lora.rank-by-partition", self.ranks_by_partition),
        ):
            for rank in ranks.values():
                self.check_rank(rank, key)
        if self.trunk.train != "lora":
            raise ConfigError(
                f"lora.trunk.train is {self.trunk.train!r}, but the trunk is trained in full by "
                'trunk.train = "full". Leave lora.trunk.train out.'
            )

    @property
    def ranks_by_memory(self) -> dict[float, int]:
        """Memory in GiB -> rank of the nodes that have at most so much, ascending."""
        return dict(sorted(_ranks("lora.rank-by-memory", self.rank_by_memory, float).items()))

    @property
    def ranks_by_partition(self) -> dict[int, int]:
        """Partition -> its client's rank."""
        return _ranks("lora.rank-by-partition", self.rank_by_partition, int)

    def check_rank(self, rank: int, who: str) -> None:
        """Refuse a client's own rank above those of all parts that it holds.

        Args:
            rank: The rank, at least 1.
            who: Where it is said, as the subject of the error's sentence.

        Raises:
            ConfigError: It is below 1, or above.
        """
        most = max(self.bottom.r, self.top.r)
        if not 1 <= rank <= most:
            raise ConfigError(
                f"{who} has the LoRA rank {rank}; a client's own rank must be from 1 to the larger of "
                f"lora.bottom.r and lora.top.r, {most}, at which the global adapter is kept. Raise "
                "those, or lower it."
            )


Key = TypeVar("Key", int, float)


def _ranks(key: str, text: str, kind: Callable[[str], Key]) -> dict[Key, int]:
    """Read ``"number=rank, number=rank"`` as a mapping."""
    found: dict[Key, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, rank = (part.strip() for part in item.partition("="))
        try:
            number, value = kind(name), int(rank)
        except ValueError:
            raise ConfigError(
                f'{key} must read "number=rank, number=rank"; {item!r} in it does not.'
            ) from None
        if number in found or not number >= 0:
            raise ConfigError(f"{key} must name each number once, from 0; {item!r} in it does not.")
        found[number] = value
    return found


# PEFT's options that a part cannot have, and why.
_REFUSED_LORA = {
    "init-lora-weights": "initial values that take something out of the base weights or need data "
    "(pissa, olora, mica, loftq, corda, eva, lora_ga) would leave every client with base weights of "
    "its own. Use lora.*.init: kaiming, gaussian, orthogonal or random",
    "layer-replication": "replicated layers would change the layers' indices, by which the model is cut",
    "use-qalora": "its factors do not have the shape that aggregation needs",
    "lora-bias": "a bias of B is no part of ΔW, which is what most methods aggregate. Use "
    "lora.*.bias, which trains the base's biases",
    "trainable-token-indices": "rows of an embedding are no tensor of their own. Use LoRA on the "
    "embedding (target-modules), or modules-to-save",
    "target-parameters": "parameters that belong to no linear layer have no factors to aggregate. Use "
    "target-modules",
    "layers-to-transform": "a part's layers are told by the cut layers. Use target-modules with the "
    "layers' names, such as layers.3.mlp.up_proj",
    "exclude-modules": "target-modules names what gets LoRA, one suffix for each",
    "megatron-config": "the parts are transformers' own modules",
    "loftq-config": "its initial values change the base weights",
    "eva-config": "its initial values need data",
    "corda-config": "its initial values need data",
    "lora-ga-config": "its initial values need data",
    "alora-invocation-tokens": "the trunk never sees the tokens",
    "arrow-config": "it routes between several adapters, and a part has one",
    "velora-config": "its projections are rebuilt from data, on each client its own",
    "monteclora-config": "its factors are distributions, and a mean of samples is not their mean",
    "kasa-config": "its diagonal lies between the factors, so ΔW is not their product",
    "use-bdlora": "its factors are block diagonal, and a mean of ΔW is not",
    "ensure-weight-tying": "a tied embedding and head stay tied where both train, and are untied "
    "where one does",
}


def refuse_peft_option(key: str) -> None:
    """Say why a part cannot have this option of PEFT's, if it is one."""
    group, _, name = key.rpartition(".")
    if group in ("lora.bottom", "lora.trunk", "lora.top") and name in _REFUSED_LORA:
        raise ConfigError(f"{key} is not supported: {_REFUSED_LORA[name]}.")
