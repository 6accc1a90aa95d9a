"""The trunk that a run config describes: model, LoRA, optimizer, engine."""

from pathlib import Path

import torch

from flower_split.aggregation.rules.parse import parse_rules
from flower_split.config import RunConfig, TrunkConfig
from flower_split.errors import AggregationError, ConfigError
from flower_split.lora import attach_lora
from flower_split.parties.fingerprint import fingerprint
from flower_split.runtime.devices import resolve_device
from flower_split.split import CutLayers, TrunkModel, load_trunk_model
from flower_split.split.loading.model_source import ModelSource
from flower_split.split.structure.compute_mode import compute_fast
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import Reduction
from flower_split.trunk.compute.schema_probe import schema_of
from flower_split.trunk.compute.warm_up import warm_up
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.shares import Shares
from flower_split.trunk.engine.window_rules import make_window_rule
from flower_split.wire.codecs import make_codec

_GIB = 2**30


def make_engine(config: RunConfig, checkpoints: Path | None = None) -> TrunkEngine:
    """Load the trunk layers of ``config.model``, make trainable what ``config`` trains, and serve it.

    Sets this process's intra-op thread count.

    Args:
        config: The run's configuration.
        checkpoints: The directory of the trunk's checkpoints; None: none are kept.

    Raises:
        SplitError: The model cannot be loaded or cut.
        ConfigError: The device, the codec or the window rule is not there, or quantised weights would
            have to train.
    """
    make_codec(config.trunk.wire_dtype)  # before minutes of loading
    window_rule = make_window_rule(config.trunk.window_rule)
    torch.set_num_threads(config.trunk.num_threads)
    cuts = CutLayers(config.model.first_cut, config.model.second_cut)
    trunk = load_trunk_model(
        ModelSource.of(config.model),
        cuts,
        device=_device(config.trunk),
        device_map=config.trunk.device_map or None,
    )
    trains_fully = config.mode == "joint" and config.trunk.train == "full"
    if trains_fully and getattr(trunk.config, "quantization_config", None) is not None:
        raise ConfigError(
            'trunk.train = "full" trains every weight of the trunk, and quantised weights do not '
            'train. Use trunk.train = "lora", or model.quantization = "" or "dequantize".'
        )
    trunk.requires_grad_(trains_fully)
    if config.mode == "joint" and not trains_fully:
        attach_lora(trunk, cuts, {"trunk": config.lora.trunk}, seed=config.seed)
    inputs = schema_of(
        trunk, trunk.hidden_size
    )  # before compilation, which every form would repeat
    return TrunkEngine(
        _compute(config, trunk),
        mode=config.mode,
        hidden_size=trunk.hidden_size,
        fingerprint=fingerprint(config),
        activation_bytes=int(config.trunk.activation_memory * _GIB),
        activation_bytes_per_client=int(config.trunk.activation_memory_per_client * _GIB),
        cache_bytes=int(config.trunk.cache_memory * _GIB),
        weight_bytes=int(config.trunk.snapshot_memory * _GIB),
        reduction=_reduction(config.trunk),
        checkpoints=CheckpointStore(checkpoints) if checkpoints else None,
        inputs=inputs,
        window_rule=window_rule,
        batch_positions=config.trunk.batch_positions,
        shares=Shares(
            evaluations=config.trunk.max_evaluations,
            compute_seconds=config.trunk.max_compute_seconds,
            held_bytes=int(config.trunk.held_memory_per_client * _GIB),
        ),
    )


def _compute(config: RunConfig, trunk: TrunkModel) -> TrunkCompute:
    """Return the trunk's arithmetic in the mode of ``trunk.compute``, compiled where that is fast."""
    fast = config.trunk.compute == "fast"
    if fast:
        compute_fast(trunk, trunk.stack.layers(trunk))
    compute = TrunkCompute(trunk, config.trunk.optimizer, seed=config.seed, fused=fast)
    if fast and compute.device.type == "cuda":
        rows, length = config.train.batch_size, config.train.sequence_length
        if config.trunk.batch_positions:
            most = max(rows, config.trunk.batch_positions // length)
            rows = min(rows * config.num_clients, most)
        warm_up(compute, trunk.hidden_size, rows, length)
    return compute


def _device(config: TrunkConfig) -> str | None:
    """Return the one device of a trunk whose layers are not placed by a device map."""
    return None if config.device_map else str(resolve_device(config.device, "trunk.device"))


def _reduction(config: TrunkConfig) -> Reduction:
    """Return what ``trunk.reduction`` and ``trunk.max-client-grad-norm`` say.

    Raises:
        ConfigError: A rule is unknown.
    """
    text = "" if config.reduction == "mean" else config.reduction
    try:
        rules = parse_rules(text)
    except AggregationError as error:
        raise ConfigError(f"trunk.reduction = {config.reduction!r}: {error}") from error
    return Reduction(
        max_client_norm=config.max_client_grad_norm,
        rules=rules,
        exclude_bad=config.on_bad_client == "exclude",
        outlier_factor=config.outlier_factor,
    )
