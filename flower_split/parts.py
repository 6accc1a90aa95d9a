"""Which parts of the model who holds, and their LoRA, as the run config says."""

from flower_split.config import LoraPartConfig, RunConfig
from flower_split.split import CutLayers


def model_cuts(config: RunConfig) -> CutLayers:
    """Where the run's model is cut."""
    return CutLayers(config.model.first_cut, config.model.second_cut)


def client_parts(config: RunConfig) -> dict[str, LoraPartConfig]:
    """LoRA of the parts that a client holds; a part with rank 0 has none."""
    return _with_lora({"bottom": config.lora.bottom, "top": config.lora.top})


def trunk_parts(config: RunConfig) -> dict[str, LoraPartConfig]:
    """LoRA of the trunk; empty where the trunk has none."""
    return _with_lora({"trunk": config.lora.trunk})


def all_parts(config: RunConfig) -> dict[str, LoraPartConfig]:
    """LoRA of the whole model, for a client that trains alone."""
    return client_parts(config) | trunk_parts(config)


def _with_lora(parts: dict[str, LoraPartConfig]) -> dict[str, LoraPartConfig]:
    return {name: part for name, part in parts.items() if part.r > 0}
