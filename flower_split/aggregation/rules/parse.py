"""The robust rules and weightings by name, as a configuration gives them."""

import typing
from dataclasses import fields
from types import MappingProxyType
from typing import TypeGuard

from flower_split.aggregation.rules.coordinate_wise import Median, TrimmedMean
from flower_split.aggregation.rules.krum import Krum, MultiKrum
from flower_split.aggregation.rules.norm_clipping import NormClipping
from flower_split.aggregation.rules.rule import ClampWeights, Rule, UniformWeights
from flower_split.errors import AggregationError
from flower_split.runtime.registry import Registry


def _is_rule(found: object) -> TypeGuard[type[Rule]]:
    return isinstance(found, type) and issubclass(found, Rule)


RULES: Registry[type[Rule]] = Registry(
    group="flower_split.rules",
    key="the rule",
    form="a subclass of flower_split.aggregation.rules.rule.Rule",
    machines="the ServerApp runs (for trunk.reduction, where the trunk runs)",
    built_in=MappingProxyType(
        {
            rule.name: rule
            for rule in (
                UniformWeights,
                ClampWeights,
                NormClipping,
                TrimmedMean,
                Median,
                Krum,
                MultiKrum,
            )
        }
    ),
    accepts=_is_rule,
    error=AggregationError,
)


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Make the rules that a configuration names, in their order.

    Args:
        text: Comma-separated ``name`` or ``name=value``: ``uniform``, ``clamp-weights=10``,
            ``norm-clipping=1.0``, ``trimmed-mean=0.2``, ``median``, ``krum=1`` (malicious clients)
            or ``multi-krum=1`` (keeps all but those), a plug-in's name or an import path. Empty:
            none.

    Raises:
        AggregationError: A name is unknown, or its value is missing or wrong.
    """
    return tuple(_parse_rule(item.strip()) for item in text.split(",") if item.strip())


def _parse_rule(item: str) -> Rule:
    name, equals, value = (part.strip() for part in item.partition("="))
    rule = RULES.get(name)
    own = [field.name for field in fields(rule)]
    if not own:
        if equals:
            raise AggregationError(f"rule {item!r}: {name} takes no value. Write {name!r}.")
        return rule()
    if not equals:
        raise AggregationError(
            f'rule {item!r}: {name} needs a value, its {own[0]}. Write "{name}=...".'
        )
    kind = typing.get_type_hints(rule)[own[0]]
    # Only the class knows its fields' names, so no checker can know this call's keyword.
    make = typing.cast(typing.Callable[..., Rule], rule)
    return make(**{own[0]: _value(item, value, kind)})


def _value(item: str, text: str, kind: object) -> int | float | str:
    """Read a rule's value in the type of its first field."""
    if kind is str:
        return text
    try:
        number = float(text)
    except ValueError:
        raise AggregationError(f"rule {item!r} needs a number after the =.") from None
    if kind is not int:
        return number
    if not number.is_integer():
        raise AggregationError(f"rule {item!r} needs a whole number after the =.")
    return int(number)
