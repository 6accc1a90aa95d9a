"""The aggregation that a run config describes, and what of it cannot be combined.

Everything that can be known before the run is checked before the run; errors name the reason. What
is only known once the clients have said what they hold is :func:`check_clients`.
"""

import logging
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from types import NoneType

from torch import Tensor

from flower_split.aggregation.adapter_aggregator import AdapterAggregator
from flower_split.aggregation.core.adapter_layout import EMBEDDING
from flower_split.aggregation.core.client_updates import AdapterSpec
from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.core.server_optimizer import ADAPTIVE
from flower_split.aggregation.methods.florist import FLoRIST
from flower_split.aggregation.methods.product_family import ProductAggregator
from flower_split.aggregation.methods.registry import AGGREGATORS, METHODS, make_aggregator
from flower_split.aggregation.rules.dora import has_magnitudes
from flower_split.aggregation.rules.parse import parse_rules
from flower_split.aggregation.rules.rule import Rule
from flower_split.config import StrategyConfig
from flower_split.errors import AggregationError
from flower_split.runtime.devices import resolve_device

logger = logging.getLogger(__name__)

_OWN_KEYS = {  # options of a method that have a key of their own
    "max_rank": "strategy.max-rank",
    "learning_rate": "strategy.server-learning-rate",
    "server_optimizer": "strategy.server-optimizer",
    "beta1": "strategy.server-beta1",
    "beta2": "strategy.server-beta2",
    "epsilon": "strategy.server-epsilon",
}

Option = int | float | str | None


def adapter_aggregator(config: StrategyConfig, scales: Mapping[str, float]) -> AdapterAggregator:
    """Return the aggregator of a run config.

    Args:
        config: The run's strategy.
        scales: Module name → ΔW scale of the initial adapter.

    Raises:
        AggregationError: As for :func:`check_strategy`.
        ConfigError: The device is not there.
    """
    return AdapterAggregator(
        check_strategy(config),
        scales,
        transforms=parse_rules(config.rules),
        on_invalid=config.on_invalid,
        workers=config.num_threads,
        device=str(resolve_device(config.device, "strategy.device")),
        outlier_factor=config.outlier_factor,
    )


def check_strategy(config: StrategyConfig) -> Aggregator:
    """Check everything that needs neither a model nor clients.

    Returns:
        The method with its options.

    Raises:
        AggregationError: The method is unknown, does not have an option, or cannot be combined with
            a rule, a rank or a server optimizer; the reason is given.
    """
    method = make_aggregator(
        config.aggregator, max_rank=config.max_rank or None, **_options(config)
    )
    if config.max_rank and not method.recompresses:
        raise AggregationError(
            f"strategy.max-rank is {config.max_rank}, but {method.name} keeps no ΔW of a rank of its "
            f"own that it could bound; {_names('recompresses')} do. Set it to 0."
        )
    _check_rules(method, parse_rules(config.rules), buffered=config.name == "fedbuff")
    if config.server_optimizer in ADAPTIVE and config.server_learning_rate == 1:
        logger.warning(
            "strategy.server-optimizer = %s with strategy.server-learning-rate = 1 moves every entry "
            "of ΔW by about 1 in a round; a LoRA's ΔW needs steps of 0.001 to 0.01",
            config.server_optimizer,
        )
    if isinstance(method, FLoRIST) and method.tau == 1:
        logger.warning(
            "strategy.aggregator = florist at tau = 1 keeps all singular values, as flexlora does; its "
            "paper uses 0.80 to 0.99, such as strategy.options = tau=0.9"
        )
    return method


def check_clients(
    config: StrategyConfig,
    specs: Mapping[int, AdapterSpec],
    num_participants: int,
    node_of: Callable[[int], int] | None = None,
) -> None:
    """Check what depends on who takes part.

    Args:
        config: The run's strategy.
        specs: Slot to what that client holds, of the clients that do not hold all of the adapter at
            its initial ranks and scales.
        num_participants: Clients in a training round.
        node_of: A slot's node, to be named in errors.

    Raises:
        AggregationError: The method or a rule cannot work on these clients.
    """

    def named(slots: Iterable[int]) -> str:
        return ", ".join(
            f"{slot} (node {node_of(slot)})" if node_of else str(slot) for slot in sorted(slots)
        )

    method = AGGREGATORS.get(config.aggregator)
    ranks = {slot: _ranks_of(spec) for slot, spec in specs.items() if spec.ranks}
    if ranks and not method.mixed_ranks:
        listed = "; ".join(f"rank {ranks[slot]} of partition {named([slot])}" for slot in ranks)
        raise AggregationError(
            f'strategy.aggregator = "{method.name}" needs one rank for all clients, but some have '
            f"their own: {listed}. {_names('mixed_ranks')} serve mixed ranks: use one of them, or "
            "give every client the same rank."
        )
    scaled = [slot for slot, spec in specs.items() if spec.scales]
    if scaled and not method.mixed_scales:
        raise AggregationError(
            f'strategy.aggregator = "{method.name}" averages factors, which means nothing under mixed '
            f"scales of ΔW, but partitions {named(scaled)} have their own (lora-alpha). Use "
            '"product-delta", or give all the same.'
        )
    for rule in parse_rules(config.rules):
        _check_rule_on(rule, specs, num_participants, named)


def _check_rule_on(
    rule: Rule,
    specs: Mapping[int, AdapterSpec],
    num_participants: int,
    named: Callable[[Iterable[int]], str],
) -> None:
    """Refuse a rule that cannot work on these clients; see :func:`check_clients`."""
    if rule.entry_by_entry:
        others = [slot for slot, spec in specs.items() if spec.ranks or spec.scales]
        if others:
            raise AggregationError(
                f"strategy.rules has {rule.name}, which compares factors entry by entry, so "
                f"all clients must have one rank and scale; partitions {named(others)} have "
                "their own. Use multi-krum or norm-clipping, which compare ΔW."
            )
    if rule.whole_adapters:
        partial = [slot for slot, spec in specs.items() if spec.modules is not None]
        if partial:
            raise AggregationError(
                f"strategy.rules has {rule.name}, which compares whole adapters; partitions "
                f"{named(partial)} hold only some of its modules (other cut layers). Use "
                "norm-clipping, trimmed-mean or median."
            )
    if num_participants < rule.clients_needed:
        raise AggregationError(
            f"strategy.rules has {rule}, which needs at least {rule.clients_needed} clients in a "
            f"round; {num_participants} take part. Raise num-clients or fraction-train, or lower "
            "the rule's number."
        )


def check_adapter(config: StrategyConfig, adapter: Mapping[str, Tensor]) -> None:
    """Check what depends on what the adapter holds.

    Raises:
        AggregationError: It has DoRA, and the method would put something into the base, or keep
            factors private, to which a magnitude then does not fit; or it has LoRA on embeddings,
            and the method trains a core.
    """
    method = AGGREGATORS.get(config.aggregator)
    if has_magnitudes(adapter) and (method.changes_base or method.private):
        does = "changes the clients' base weights" if method.changes_base else "keeps B private"
        raise AggregationError(
            f'strategy.aggregator = "{method.name}" {does}, and the magnitudes of DoRA '
            "(lora.*.use-dora) would be those of other weights. Use "
            '"product-delta", or set lora.*.use-dora = false.'
        )
    embeddings = sorted(name for name in adapter if name.endswith(EMBEDDING))
    if method.trains_core and embeddings:
        raise AggregationError(
            f'strategy.aggregator = "{method.name}" trains a core between the factors of linear layers; '
            f"{embeddings[0]} belongs to an embedding. Leave embeddings out of lora.*.target-modules, "
            'or use "product-delta".'
        )


def fits_dora(config: StrategyConfig, adapter: Mapping[str, Tensor]) -> bool:
    """Return whether the mean of clients with DoRA is made exact: the method's result is the mean of ΔW."""
    return (
        config.name in ("lora-fedavg", "fedbuff")
        and config.dora == "exact"
        and has_magnitudes(adapter)
        and issubclass(AGGREGATORS.get(config.aggregator), ProductAggregator)
        and not config.rules
        and config.server_optimizer == "none"
        and config.server_learning_rate == 1
    )


def _options(config: StrategyConfig) -> dict[str, Option]:
    """Return the method's options: its own of ``strategy.options``, and the server's step."""
    options = parse_options(config.aggregator, config.options)
    if config.server_learning_rate != 1:
        options["learning_rate"] = config.server_learning_rate
    chosen: dict[str, Option] = {
        "server_optimizer": config.server_optimizer,
        "beta1": config.server_beta1,
        "beta2": config.server_beta2,
        "epsilon": config.server_epsilon,
    }
    defaults = StrategyConfig()
    if config.server_optimizer != "none":
        return options | chosen
    for name, default in (
        ("beta1", defaults.server_beta1),
        ("beta2", defaults.server_beta2),
        ("epsilon", defaults.server_epsilon),
    ):
        if chosen[name] != default:
            raise AggregationError(
                f"{_OWN_KEYS[name]} is {chosen[name]!r}, but strategy.server-optimizer is none, "
                "which has no moments. Choose an optimizer, or leave it out."
            )
    return options


def parse_options(name: str, text: str) -> dict[str, Option]:
    """Return a method's own options of ``"name=value, name=value"``, in the types of its fields.

    Args:
        name: The method.
        text: Names as in the method's module, with dashes or underscores.

    Raises:
        AggregationError: The method or an option is unknown, an option has a key of its own, or a
            value has the wrong type.
    """
    method = AGGREGATORS.get(name)
    hints = typing.get_type_hints(method)
    own = [item.name for item in fields(method) if item.name not in _OWN_KEYS]
    options: dict[str, Option] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        label, equals, value = (part.strip() for part in item.partition("="))
        key = label.replace("-", "_")
        if key in _OWN_KEYS:
            raise AggregationError(
                f"strategy.options has {label}, which is {_OWN_KEYS[key]}. Set that key instead."
            )
        if key not in own or not equals or key in options:
            raise AggregationError(
                f'strategy.options must read "name=value, name=value", each name once; {item!r} in '
                f"it is none of {name}'s options, which are {', '.join(own)}."
            )
        options[key] = _value(label, value, hints[key])
    return options


def _value(label: str, text: str, hint: object) -> Option:
    """Return ``text`` in the type of a field."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not NoneType]
    for kind in kinds:
        if kind in (int, float, str):
            try:
                return typing.cast(Option, kind(text))
            except ValueError:
                continue
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise AggregationError(f"strategy.options: {label} must be {wanted}; it is {text!r}.")


def _check_rules(method: Aggregator, rules: Sequence[Rule], *, buffered: bool) -> None:
    """Refuse rules that would do nothing, or cannot work, with this method or after another rule."""
    for index, rule in enumerate(rules):
        label = rule.name
        if rule.changes_weights and not method.counts_weights:
            raise AggregationError(
                f"strategy.rules has {label}, which changes the clients' weights, but {method.name} "
                "weighs clients by the size of their ΔW, not by what they report. Leave it out."
            )
        if method.private and rule.measures_delta:
            parts = " and ".join(sorted(method.private))
            raise AggregationError(
                f"strategy.rules has {label}, which measures changes of ΔW, but with {method.name} "
                f"{parts} stays with each client, so the server sees no ΔW. Use trimmed-mean or "
                "median, which compare the factors that are shared."
            )
        before = next((r for r in rules[:index] if r.leaves_one), None)
        if before is not None and not rule.works_alone:
            raise AggregationError(
                f"strategy.rules has {label} after {before.name}, which leaves a single client: "
                "there is nothing left to weigh or compare. Put it before, or leave it out."
            )
        if rule.leaves_one and buffered:
            raise AggregationError(
                f"strategy.rules has {label}, which makes one client of all; with strategy.name = "
                '"fedbuff" clients of several versions each keep their staleness. Use norm-clipping '
                "or multi-krum."
            )


def _names(trait: str) -> str:
    return ", ".join(name for name, method in METHODS.items() if getattr(method, trait))


def _ranks_of(spec: AdapterSpec) -> str:
    """Return the ranks of a client's modules, ascending, each once."""
    ranks = spec.ranks.values() if isinstance(spec.ranks, Mapping) else [spec.ranks]
    return " and ".join(str(rank) for rank in sorted({rank for rank in ranks if rank is not None}))
