"""Make the inner strategy that a run config names: LoRA-aware averaging, or one of Flower's.

Flower's strategies see the adapter as a bag of weights: they average A and B each for itself, as
FedIT does (Zhang et al., "Towards Building the Federated GPT", ICASSP 2024), which is not the
average of the clients' ΔW. With ``strategy.aggregator = "ffa-lora"`` they see A frozen and average
B alone, which is (Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024);
that is also what differential privacy needs, whose noise would otherwise multiply with itself in
B @ A.

Combinations that cannot work are refused here, before the first round, with the reason.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    Strategy,
)
from torch import Tensor

from flower_split.aggregation import AGGREGATORS
from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterSpec
from flower_split.config import RunConfig, StrategyConfig
from flower_split.errors import ConfigError
from flower_split.messages.replies import WEIGHT_METRICS
from flower_split.server.federation.handshake import num_participants
from flower_split.server.inner.fedbuff import FedBuff
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.inner.message_extras import method_notes

CLASSES: Mapping[str, type[FedAvg]] = MappingProxyType(
    {
        "fedavg": FedAvg,
        "fedavgm": FedAvgM,
        "fedadam": FedAdam,
        "fedyogi": FedYogi,
        "fedadagrad": FedAdagrad,
        "fedmedian": FedMedian,
        "fedtrimmedavg": FedTrimmedAvg,
        "krum": Krum,
        "multikrum": MultiKrum,
        "fedprox": FedProx,
    }
)
"""Flower's strategies by their names in ``strategy.name``."""

_OURS: Mapping[str, type[LoraFedAvg]] = MappingProxyType(
    {"lora-fedavg": LoraFedAvg, "fedbuff": FedBuff}
)
_UNUSED = {"eta_l": "the clients' learning rate is train.optimizer.learning-rate"}


@dataclass(frozen=True, kw_only=True, slots=True)
class InnerContext:
    """Everything that an inner strategy is made from, once the clients are known."""

    config: RunConfig
    num_clients: int  # that take part in the run
    initial: Mapping[str, Tensor]  # the clients' adapter before round 1, by tensor name
    scales: Mapping[str, float]  # module name -> scale of ΔW
    partition_of: Callable[[int], int]  # a node's data partition
    specs: Mapping[int, AdapterSpec] = field(default_factory=dict)
    """Slot -> ranks, scales and modules of clients that do not hold the whole adapter."""

    @property
    def num_sampled(self) -> int:
        """Return how many clients' training a round takes."""
        if self.config.strategy.name == "fedbuff":
            return self.config.strategy.buffer_size
        return num_participants(self.num_clients, self.config.fraction_train)


InnerFactory = Callable[[InnerContext], Strategy]
"""Makes the inner strategy, once per run, after the handshake and before round 1.

Flower's strategies must be told ``min_*_nodes`` of 1, as the clients are sampled outside, and must
weigh replies by ``num-tokens`` or ``num-examples``. What they carry from round to round is kept only
for Flower's own classes and for those with ``state_dict`` and ``load_state_dict``
(:class:`~flower_split.runs.manifest.Resumable`); a run with any other cannot be resumed."""


def make_inner(context: InnerContext) -> Strategy:
    """Make the strategy that ``strategy.*`` names, without privacy.

    Raises:
        ConfigError: Keys or clients do not fit the strategy.
        AggregationError: They do not fit the aggregator.
    """
    config = context.config.strategy
    if config.name in _OURS:
        ours = _OURS[config.name]
        if context.config.privacy.mechanism != "none":  # the norms would travel without noise
            config = replace(config, dora="mean")
        return ours(config, context.scales, context.initial, context.partition_of, context.specs)
    check_flower(config)
    if context.specs:
        raise ConfigError(
            f'strategy.name = "{config.name}" averages weights name by name and cannot mix clients of '
            f"other ranks or modules: partitions {', '.join(map(str, sorted(context.specs)))}. Use "
            'strategy.name = "lora-fedavg" with strategy.aggregator = "product-delta".'
        )
    options = parse_options(config.name, config.options)
    _check_clients(config.name, options, context)
    weights = WEIGHT_METRICS[config.weighting]
    common = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    make: Callable[..., FedAvg] = CLASSES[config.name]
    try:
        return make(weighted_by_key=weights, **common, **options)
    except ValueError as error:
        raise ConfigError(f'strategy.options of "{config.name}": {error}') from error


def frozen_names(context: InnerContext) -> list[str]:
    """Return the weights that stay as they began where Flower's strategies see ``ffa-lora``: every A."""
    config = context.config.strategy
    if config.name in _OURS or config.aggregator != "ffa-lora":
        return []
    method = AdapterAggregator("ffa-lora", context.scales)
    method.init(context.initial)
    return sorted(context.initial.keys() - set(method.trainable()))


def own_options(name: str) -> dict[str, type]:
    """Return the options that a class of Flower's has beyond FedAvg's, with their types."""
    common = inspect.signature(FedAvg).parameters
    return {
        option: type(parameter.default)
        for option, parameter in inspect.signature(CLASSES[name]).parameters.items()
        if option not in common and option not in _UNUSED
    }


def parse_options(name: str, text: str) -> dict[str, int | float]:
    """Parse ``strategy.options`` for a class of Flower's; dashes in a name count as underscores.

    Raises:
        ConfigError: An option is unknown, no number, or out of range.
    """
    known, values = own_options(name), {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        written, _, value = item.partition("=")
        option = written.strip().replace("-", "_")
        if option not in known:
            hint = _UNUSED.get(option, f"its options are {', '.join(known) or 'none'}")
            raise ConfigError(
                f'strategy.options: "{name}" has no option {written.strip()!r}; {hint}.'
            )
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < 0 or (known[option] is int and number % 1):
            kind = "a whole number" if known[option] is int else "a number"
            raise ConfigError(
                f'strategy.options: {written.strip()} of "{name}" must be {kind} of at least 0; it is '
                f"{value.strip()!r}."
            )
        if option.startswith("beta_") and number >= 1:
            raise ConfigError(
                f"strategy.options: {option} is a decay and must be below 1; it is {number:g}."
            )
        values[option] = known[option](number)
    return values


def check_flower(config: StrategyConfig) -> None:
    """Check the options that ``strategy.*`` gives a class of Flower's; needs no client.

    Raises:
        ConfigError: An option is unknown, missing or out of range.
    """
    options = parse_options(config.name, config.options)
    if config.name == "fedprox" and not options.get("proximal_mu"):
        raise ConfigError(
            'strategy.name = "fedprox" needs strategy.options = "proximal-mu=…" above 0; with 0 it is '
            'FedAvg. Set it, or strategy.name = "fedavg".'
        )


def _check_clients(name: str, options: Mapping[str, int | float], context: InnerContext) -> None:
    count = context.num_sampled
    if name in ("krum", "multikrum"):
        bad = int(options.get("num_malicious_nodes", 0))
        chosen = int(options.get("num_nodes_to_select", 1))
        if count < 2 * bad + 3:
            raise ConfigError(
                f'strategy.name = "{name}" against {bad} malicious clients needs at least '
                f"{2 * bad + 3} clients in a round (2 f + 3); there are {count}. Use more clients, or "
                "a smaller num-malicious-nodes in strategy.options."
            )
        if not 1 <= chosen <= count - bad - 2:
            raise ConfigError(
                f"strategy.options: num-nodes-to-select must be from 1 to {count - bad - 2} for "
                f"{count} clients in a round of which {bad} are malicious (n - f - 2); it is {chosen}."
            )
        if context.config.trunk.quorum_of(count) < 1:
            raise ConfigError(
                f'strategy.name = "{name}" counts on all {count} clients of a round, and a quorum '
                "below 1 lets rounds go on with fewer. Set trunk.quorum = 1 and trunk.quorum-count = 0."
            )


def inner_notes(context: InnerContext) -> list[str]:
    """Return what a reader of the report must know about the strategy that the run config names."""
    config, notes = context.config.strategy, []
    if config.name == "fedbuff" and config.max_staleness > 0:
        notes.append(
            'strategy.name = "fedbuff": the order in which clients come back depends on time, so two '
            "runs differ; metrics.jsonl records it. strategy.max-staleness = 0 is repeatable."
        )
    if config.name in _OURS:
        return notes + method_notes(AGGREGATORS.get(config.aggregator))
    options, count = parse_options(config.name, config.options), context.num_sampled
    if config.aggregator != "ffa-lora":
        notes.append(
            f'strategy.name = "{config.name}" averages A and B each for itself; that is not the '
            'average of the clients\' ΔW. strategy.name = "lora-fedavg" aggregates ΔW.'
        )
    if config.name == "fedtrimmedavg" and int(options.get("beta", 0.2) * count) == 0:
        notes.append(
            f"fedtrimmedavg trims no client: beta = {options.get('beta', 0.2):g} of {count} clients "
            f"is less than one. Raise beta in strategy.options to at least {1 / count:.3g}."
        )
    if config.name == "fedmedian" and count < 3:
        notes.append(f"fedmedian over {count} clients is their mean, and robust to nobody.")
    if config.name in ("fedadam", "fedyogi", "fedadagrad") and "eta" not in options:
        notes.append(
            f"{config.name} steps by Flower's default eta, which is made for whole models and moves "
            'LoRA weights by many times the clients\' change. Set strategy.options = "eta=…".'
        )
    return notes
