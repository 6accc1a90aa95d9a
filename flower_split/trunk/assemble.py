"""The trunk's engine as the run config describes it: model, LoRA, optimizer, budget."""

import torch

from flower_split.assets import resolve_model_path
from flower_split.config import RunConfig
from flower_split.devices import pick_device
from flower_split.fingerprint import fingerprint
from flower_split.lora import attach_lora
from flower_split.parts import model_cuts, trunk_parts
from flower_split.split import TrunkModel, load_trunk_model
from flower_split.trunk.compute import TrunkCompute
from flower_split.trunk.engine import TrunkEngine

_GIB = 1 << 30


def make_engine(config: RunConfig) -> TrunkEngine:
    """Load the trunk and put the engine around it.

    Only in mode ``joint`` does anything of it train: its LoRA, or every weight.

    Raises:
        SplitError: The model cannot be loaded or cut.
        ConfigError: The device or the LoRA settings do not fit.
    """
    torch.set_num_threads(config.trunk.num_threads)
    trunk = load_trunk_model(
        resolve_model_path(config.model.name),
        model_cuts(config),
        dtype=config.model.dtype,
        attn_implementation=config.model.attn_implementation or None,
        revision=config.model.revision or None,
        device=pick_device("trunk.device", config.trunk.device),
    )
    _choose_trainable(trunk, config)
    return TrunkEngine(
        TrunkCompute(trunk, config.trunk.optimizer, seed=config.seed),
        mode=config.mode,
        hidden_size=trunk.hidden_size,
        fingerprint=fingerprint(config),
        activation_bytes=int(config.trunk.activation_memory * _GIB),
    )


def _choose_trainable(trunk: TrunkModel, config: RunConfig) -> None:
    if config.mode == "joint" and config.trunk.train == "lora":
        attach_lora(trunk, model_cuts(config), trunk_parts(config), seed=config.seed)
    else:
        trunk.requires_grad_(config.mode == "joint")
