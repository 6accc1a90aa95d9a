"""The trunk that a run config describes: model, LoRA, optimizer, engine; or several over one base."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from flower_split.aggregation.rules.parse import parse_rules
from flower_split.config import RunConfig, TrunkConfig
from flower_split.config.validation import Scalar
from flower_split.errors import (
    AggregationError,
    ConfigError,
    RefusalReason,
    SplitError,
    TrunkRefused,
)
from flower_split.lora import attach_lora
from flower_split.parties.experiment_settings import adopted, experiment_fingerprint
from flower_split.parties.fingerprint import fingerprint
from flower_split.runtime.devices import resolve_device
from flower_split.split import CutLayers, TrunkModel, load_trunk_model
from flower_split.split.loading.model_source import ModelSource
from flower_split.split.structure.compute_mode import compute_fast
from flower_split.trunk.compute.checks import InputSchema
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.fair_device import DeviceShare, FairDevice
from flower_split.trunk.compute.gradients import Reduction
from flower_split.trunk.compute.schema_probe import schema_of
from flower_split.trunk.compute.shared_base import SharedBase
from flower_split.trunk.compute.warm_up import warm_up
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.shares import Shares
from flower_split.trunk.engine.window_rules import make_window_rule
from flower_split.trunk.replicas.processes import Followers, Replicas
from flower_split.trunk.tensor_parallel.ranks import Ranks
from flower_split.wire.codecs import WireCodecs

_GIB = 2**30
_DEVICE_SECONDS = 30.0  # that a new experiment waits for its turn; its coordinator asks again


def make_engine(
    config: RunConfig, checkpoints: Path | None = None, followers: Followers | None = None
) -> TrunkEngine:
    """Load the trunk layers of ``config.model``, make trainable what ``config`` trains, and serve it.

    Sets this process's intra-op thread count.

    Args:
        config: The run's configuration.
        checkpoints: The directory of the trunk's checkpoints; None: none are kept.
        followers: Those of ``trunk.replicas`` or ``trunk.tensor-parallel``, which the caller closes;
            None: there are none.

    Raises:
        SplitError: The model cannot be loaded or cut.
        ConfigError: The device, a codec or the window rule is not there, quantised weights would
            have to train, or there are not as many processes as ``config`` says.
        TrunkUnavailable: A follower did not load.
    """
    if config.trunk.processes != (1 if followers is None else followers.size):
        raise ConfigError(
            f"{config.trunk.processes} processes are to compute the trunk (trunk.replicas, "
            "trunk.tensor-parallel), and this one leads no others. Serve the trunk with flower-split "
            "trunk, or with RunningTrunk."
        )
    WireCodecs.make(
        config.trunk.wire_dtype, config.trunk.gradient_wire_dtype
    )  # before minutes of loading
    make_window_rule(config.trunk.window_rule)
    if isinstance(followers, Ranks):
        followers.begin(resolve_device(config.trunk.device, "trunk.device"))
    trunk, inputs = load_share(config)
    if isinstance(followers, Ranks):
        trunk, inputs = followers.lead(trunk), replace(inputs, cached=None)
    return _engine(config, trunk, inputs, fingerprint(config), checkpoints, followers=followers)


def load_compute(config: RunConfig) -> TrunkCompute:
    """Return the arithmetic of a trunk that another process leads, on this process's device.

    Sets this process's intra-op thread count.

    Raises:
        SplitError: The model cannot be loaded or cut.
        ConfigError: The device is not there, or quantised weights would have to train.
    """
    trunk = _load(config)
    _attach(config, trunk)
    _compile(config, trunk)
    return _compute(config, trunk, None)


def load_share(config: RunConfig) -> tuple[TrunkModel, InputSchema]:
    """Return the trunk's layers with what trains, as they compute, and the inputs that they take.

    Of ``trunk.tensor-parallel`` processes each has a share of every layer, and all load at once. Sets this
    process's intra-op thread count.

    Raises:
        SplitError: The model cannot be loaded, cut or divided.
        ConfigError: The device is not there, or quantised weights would have to train.
    """
    trunk = _load(config)
    _attach(config, trunk)
    return trunk, _settle(config, trunk)


class ExperimentEngines:
    """Makes the engine of each experiment, over one base in memory.

    Sets this process's intra-op thread count.

    Args:
        config: The trunk's own configuration.
        checkpoints: The directory of the experiments' checkpoints; None: none are kept.

    Attributes:
        fingerprint: Fingerprint of the trunk's own configuration.
        device: The device that all experiments compute on, in turns.

    Raises:
        SplitError: The model cannot be loaded or cut.
        ConfigError: The device is not there.
    """

    def __init__(self, config: RunConfig, checkpoints: Path | None = None) -> None:
        self.config = config
        self.base = SharedBase(_load(config))
        self.fingerprint = fingerprint(config)
        self.device = FairDevice()
        self._checkpoints = checkpoints

    def make(self, owner: str, values: Mapping[str, Scalar] | None) -> TrunkEngine:
        """Return the engine of an experiment.

        Args:
            owner: Its coordinator, whose checkpoints lie in a directory of their own; empty: the trunk's
                own coordinator.
            values: What its run brings; None: it trains as the trunk's own configuration says.

        Raises:
            TrunkRefused: What it brings cannot be had here (INVALID_REQUEST), or takes more memory than
                an experiment may have (OVER_BUDGET). Nothing was allocated.
            TrunkUnavailable: The others computed all the time.
        """
        try:
            config = adopted(self.config, values)
            WireCodecs.make(config.trunk.wire_dtype, config.trunk.gradient_wire_dtype)
            make_window_rule(config.trunk.window_rule)
            self._check_memory(config)
            share = self.device.share()
            # torch's random state is the process's, and attaching draws from it.
            with share.turn(_DEVICE_SECONDS):
                trunk = self.base.twin(config.lora.trunk if config.mode == "joint" else None)
                _attach(config, trunk)
                self.base.check_untouched()
                inputs = _settle(config, trunk)
                fields = experiment_fingerprint(self.fingerprint, config)
                return _engine(config, trunk, inputs, fields, self._directory(owner), share)
        except (ConfigError, SplitError) as error:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST, f"the trunk cannot serve this experiment: {error}"
            ) from error

    def _directory(self, owner: str) -> Path | None:
        if self._checkpoints is None or not owner:
            return self._checkpoints
        return self._checkpoints / f"of-{owner}"

    def _check_memory(self, config: RunConfig) -> None:
        if config.mode != "joint":
            return
        needed = self.base.state_bytes(config.lora.trunk, config.trunk.optimizer.name)
        most = int(self.config.trunk.experiment_memory * _GIB)
        if needed > most:
            raise TrunkRefused(
                RefusalReason.OVER_BUDGET,
                f"this experiment would train {needed} bytes of weights, optimizer and copies; one may "
                f"have {most} (trunk.experiment-memory). Lower lora.trunk.r, or raise the key there.",
            )


def _load(config: RunConfig) -> TrunkModel:
    """Load the trunk layers as ``config`` says, and pin this process's threads."""
    torch.set_num_threads(config.trunk.num_threads)
    return load_trunk_model(
        ModelSource.of(config.model),
        CutLayers(config.model.first_cut, config.model.second_cut),
        device=_device(config.trunk),
        device_map=config.trunk.device_map or None,
        tensor_parallel=config.trunk.tensor_parallel,
    )


def _attach(config: RunConfig, trunk: TrunkModel) -> None:
    """Make trainable what ``config`` trains of the trunk, and nothing else.

    Raises:
        ConfigError: Quantised weights would have to train, or the adapter does not fit.
    """
    trains_fully = config.mode == "joint" and config.trunk.train == "full"
    if trains_fully and getattr(trunk.config, "quantization_config", None) is not None:
        raise ConfigError(
            'trunk.train = "full" trains every weight of the trunk, and quantised weights do not '
            'train. Use trunk.train = "lora", or model.quantization = "" or "dequantize".'
        )
    trunk.requires_grad_(trains_fully)
    if config.mode == "joint" and not trains_fully:
        attach_lora(trunk, trunk.cuts, {"trunk": config.lora.trunk}, seed=config.seed)


def _settle(config: RunConfig, trunk: TrunkModel) -> InputSchema:
    """Let the layers compute in the mode of ``trunk.compute``; return the inputs that they take."""
    inputs = schema_of(
        trunk, trunk.hidden_size
    )  # before compilation, which every form would repeat
    _compile(config, trunk)
    return inputs


def _compile(config: RunConfig, trunk: TrunkModel) -> None:
    if config.trunk.compute == "fast":
        compute_fast(trunk, trunk.stack.layers(trunk))


def _engine(
    config: RunConfig,
    trunk: TrunkModel,
    inputs: InputSchema,
    fields: Mapping[str, str],
    checkpoints: Path | None,
    share: DeviceShare | None = None,
    followers: Followers | None = None,
) -> TrunkEngine:
    """Return the engine around a trunk, with the budgets and rules of ``config``.

    Args:
        config: The experiment's.
        trunk: With what trains.
        inputs: That it takes.
        fields: The fingerprint.
        checkpoints: Their directory; None: none are kept.
        share: This engine's share of a device that others compute on, too.
        followers: Further processes; None: there are none.
    """
    compute = _compute(config, trunk, share)
    return TrunkEngine(
        compute,
        mode=config.mode,
        hidden_size=trunk.hidden_size,
        fingerprint=fields,
        activation_bytes=int(config.trunk.activation_memory * _GIB),
        activation_bytes_per_client=int(config.trunk.activation_memory_per_client * _GIB),
        cache_bytes=int(config.trunk.cache_memory * _GIB),
        weight_bytes=int(config.trunk.snapshot_memory * _GIB),
        reduction=_reduction(config.trunk),
        checkpoints=CheckpointStore(checkpoints) if checkpoints else None,
        inputs=inputs,
        window_rule=make_window_rule(config.trunk.window_rule),
        batch_positions=config.trunk.batch_positions,
        divider=followers.divider(compute) if isinstance(followers, Replicas) else None,
        shares=Shares(
            evaluations=config.trunk.max_evaluations,
            compute_seconds=config.trunk.max_compute_seconds,
            held_bytes=int(config.trunk.held_memory_per_client * _GIB),
        ),
    )


def _compute(config: RunConfig, trunk: TrunkModel, share: DeviceShare | None) -> TrunkCompute:
    """Return the trunk's arithmetic, compiled before the first call where ``trunk.compute`` is fast."""
    fast = config.trunk.compute == "fast"
    compute = TrunkCompute(trunk, config.trunk.optimizer, seed=config.seed, fused=fast, share=share)
    if fast and compute.device.type == "cuda":
        rows, length = config.train.batch_size, config.train.sequence_length
        if config.trunk.batch_positions:
            most = max(rows, config.trunk.batch_positions // length)
            clients = -(-config.num_clients // config.trunk.replicas)  # that share a pass
            rows = min(rows * clients, most)
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
