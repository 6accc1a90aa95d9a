"""What ``flower-split run`` checks before anything starts."""

import logging
import os
import re
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING

from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.runtime.secret_files import TOKEN_VARIABLE
from flower_split.runtime.simulation import pool_cap
from flower_split.server.federation.handshake import (
    federation_config,
    needs_all_at_once,
    num_participants,
)

if TYPE_CHECKING:  # the checks import torch when they need it
    from torch import Tensor

logger = logging.getLogger(__name__)

_PAIR = re.compile(r"([a-z-]+)\s*=\s*(\S+)")
_CONTROL_SECONDS = 10.0


def check_aggregation(config: RunConfig) -> None:
    """Check that ``strategy.*`` describes an aggregation that can be.

    Raises:
        AggregationError: It does not; the reason is given.
        ConfigError: A strategy of Flower's does not know an option.
    """
    from flower_split.aggregation.from_config import check_strategy
    from flower_split.server.inner.flower_strategies import check_flower

    if config.strategy.aggregates_lora:
        check_strategy(config.strategy)
    else:
        check_flower(config.strategy)


def check_model(config: RunConfig) -> "tuple[dict[str, Tensor], dict[str, float]]":
    """Check that the model can be cut as asked and takes the LoRA settings; reads no weights.

    Returns:
        The clients' initial adapter, and each module's scale of ΔW.

    Raises:
        SplitError: The model is not there, or cannot be cut so.
        ConfigError: The LoRA settings do not fit it, it is an encoder, or the tokenizer or
            train.sequence-length are too large for it; or data.source is not what can be read.
    """
    from flower_split.data import check_data
    from flower_split.lora import initial_client_adapter
    from flower_split.parties.parts import client_parts, model_cuts
    from flower_split.split.loading.model_source import ModelSource

    check_data(config)
    return initial_client_adapter(
        ModelSource.of(config.model),
        model_cuts(config),
        client_parts(config),
        seed=config.seed,
    )


def check_clients(
    config: RunConfig, adapter: "Mapping[str, Tensor]", scales: Mapping[str, float], settings: str
) -> None:
    """Check what depends on the clients of a simulation, which are known before it starts.

    The ServerApp checks it again: a deployment's clients are known only there.

    Args:
        config: The run's, for the package's own ServerApp.
        adapter: The clients' initial adapter.
        scales: Module name -> scale of ΔW.
        settings: The simulation's ``--federation-config``.

    Raises:
        AggregationError: The method or a rule cannot work on these clients.
        ConfigError: Privacy or a strategy of Flower's cannot.
    """
    from flower_split.aggregation import from_config
    from flower_split.parties.client_ranks import own_lora, rank_specs
    from flower_split.server.inner.flower_strategies import InnerContext
    from flower_split.server.privacy.mechanisms import with_privacy

    count = int(_number(dict(_PAIR.findall(settings)), "num-supernodes", 2))
    own = {slot: own_lora(config, slot) for slot in range(count)}
    context = InnerContext(
        config=config,
        num_clients=count,
        initial=adapter,
        scales=scales,
        partition_of=int,
        specs=rank_specs(config, own, scales),
    )
    if config.strategy.aggregates_lora:
        from_config.check_clients(config.strategy, context.specs, context.num_sampled)
        from_config.check_adapter(config.strategy, adapter)
    if not config.strategy.aggregates_lora or config.privacy.mechanism != "none":
        with_privacy(context)


def check_loggers(config: RunConfig) -> None:
    """Check that what ``train.report-to`` names is installed.

    Raises:
        ConfigError: It is not; names the remedy.
    """
    from flower_split.runs.loggers.registry import make_loggers

    make_loggers(config)


def check_trunk(config: RunConfig, *, hosted: bool = False) -> None:
    """Check that a trunk with an address answers to the token; one without is started later.

    Args:
        config: The run's configuration.
        hosted: Whether the ServerApp runs elsewhere, and may have a token where this machine has none:
            then it is the one to ask the trunk.

    Raises:
        ConfigError: A codec of ``trunk.wire-dtype`` or ``trunk.gradient-wire-dtype``, the transport of
            ``trunk.transport``, or the ``trunk.window-rule`` of a trunk that is started here, is not
            installed here.
        TrunkUnavailable: It does not answer.
        TrunkRefused: The token is not its own.
        ConfigError: It would train otherwise than the configuration says.
    """
    from flower_split.trunk.engine.window_rules import make_window_rule
    from flower_split.wire.client_certificate import ClientCertificate
    from flower_split.wire.codecs import WireCodecs
    from flower_split.wire.transports import TRANSPORTS

    WireCodecs.make(config.trunk.wire_dtype, config.trunk.gradient_wire_dtype)
    TRANSPORTS.get(config.trunk.transport)
    if not config.trunk.address:
        make_window_rule(config.trunk.window_rule)
        return
    if hosted and not (config.trunk.token_file or os.environ.get(TOKEN_VARIABLE)):
        logger.info(
            "the trunk %s is not asked before the run is submitted: this machine has no token for it",
            config.trunk.address,
        )
        return
    from flower_split.server.coordinator import TrunkCoordinator
    from flower_split.server.trunk_connection import check_settings, coordinator_token

    coordinator = TrunkCoordinator(
        config.trunk.address,
        coordinator_token(config.trunk.token_file, os.environ),
        root_certificates=config.trunk.root_certificates,
        timeout=_CONTROL_SECONDS,
        certificate=ClientCertificate.of(config.trunk),
        proxy=config.trunk.proxy,
    )
    with closing(coordinator):
        check_settings(config, coordinator.status())


def simulation_settings(config: RunConfig, given: str | None) -> str:
    """Return the ``--federation-config`` of a local simulation: as given, checked, or as needed.

    Raises:
        ConfigError: The federation is too small for the job, or runs too few clients at once.
    """
    wanted = config.num_clients
    at_once = num_participants(wanted, config.fraction_train) if needs_all_at_once(config) else 1
    if not given:
        if at_once > pool_cap():
            raise ConfigError(
                f'trunk.step-every = "local-step" needs {at_once} clients running at once, but a '
                f"simulation on this machine runs at most {pool_cap()}. Use trunk.step-every = "
                '"server-round", a smaller fraction-train, or a machine with more CPU cores.'
            )
        return default_settings(config)
    values = {key: value.strip("'\"") for key, value in _PAIR.findall(given)}
    nodes = _number(values, "num-supernodes", 2)
    if nodes < wanted:
        raise ConfigError(
            f"num-clients is {wanted}, but --federation-config has num-supernodes={nodes:g}. Use: "
            f"--federation-config '{default_settings(config)}'"
        )
    cpus = _number(values, "init-args-num-cpus", os.cpu_count() or 1)
    possible = min(int(cpus / max(_number(values, "client-resources-num-cpus", 2), 1)), pool_cap())
    if at_once > possible:
        raise ConfigError(
            f'trunk.step-every = "local-step" needs {at_once} clients running at once, but '
            f"--federation-config allows {possible}. Use: --federation-config "
            f"'{default_settings(config)}', or trunk.step-every = \"server-round\"."
        )
    return given


def default_settings(config: RunConfig) -> str:
    """Return the simulation that this job needs on this machine, GPUs shared evenly."""
    settings = federation_config(config.num_clients)
    if config.train.device.startswith("cuda") or config.train.device == "auto":
        import torch

        gpus = torch.cuda.device_count()
        if gpus:
            share = int(1000 * min(1.0, gpus / config.num_clients)) / 1000
            settings += f" client-resources-num-gpus={share} init-args-num-gpus={gpus}"
    return settings


def _number(values: dict[str, str], key: str, default: float) -> float:
    try:
        return float(values.get(key, default))
    except ValueError as error:
        raise ConfigError(
            f"--federation-config: {key} must be a number; it is {values[key]!r}."
        ) from error
