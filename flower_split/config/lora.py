"""LoRA of the three parts."""

from dataclasses import dataclass, field

from flower_split.config.rules import above, at_least, longest, one_of, pattern
from flower_split.errors import ConfigError

LORA_INITS = ("kaiming", "gaussian")


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
        at_least("lora.*.r", self.r, 0)
        above("lora.*.alpha", self.alpha, 0)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.*.dropout must be in [0, 1); it is {self.dropout!r}.")
        one_of("lora.*.init", self.init, LORA_INITS)
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
        return pattern("lora.*.rank-pattern", self.rank_pattern)

    @property
    def alphas(self) -> dict[str, float]:
        """Name suffix -> alpha, of ``alpha_pattern``."""
        return pattern("lora.*.alpha-pattern", self.alpha_pattern)

    def setting_of(self, module: str) -> tuple[int, float]:
        """``(rank, alpha)`` of a module, by its unsplit name."""
        rank, alpha = longest(self.ranks, module), longest(self.alphas, module)
        return (self.r if rank is None else int(rank), self.alpha if alpha is None else alpha)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfigs:
    """LoRA settings, separately for each part."""

    bottom: LoraPartConfig = field(default_factory=LoraPartConfig)
    trunk: LoraPartConfig = field(default_factory=LoraPartConfig)
    top: LoraPartConfig = field(default_factory=LoraPartConfig)


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


def refuse_peft_option(key: str) -> None:
    """Say why a part cannot have this option of PEFT's, if it is one."""
    group, _, name = key.rpartition(".")
    if group in ("lora.bottom", "lora.trunk", "lora.top") and name in _REFUSED_LORA:
        raise ConfigError(f"{key} is not supported: {_REFUSED_LORA[name]}.")
