"""The methods by name."""

from dataclasses import fields
from types import MappingProxyType
from typing import TypeGuard

from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.methods.fed_sb import FedSB
from flower_split.aggregation.methods.fedex_lora import FedExLoRA
from flower_split.aggregation.methods.fedit import FedIT
from flower_split.aggregation.methods.fedsa_lora import FedSALoRA
from flower_split.aggregation.methods.fedsvd import FedSVD
from flower_split.aggregation.methods.ffa_lora import FFALoRA
from flower_split.aggregation.methods.flexlora import FlexLoRA
from flower_split.aggregation.methods.flora import FLoRA
from flower_split.aggregation.methods.florist import FLoRIST
from flower_split.aggregation.methods.hetlora import HetLoRA
from flower_split.aggregation.methods.lora_fair import LoRAFair
from flower_split.aggregation.methods.product_delta import ProductDelta
from flower_split.aggregation.methods.raflora import RaFLoRA
from flower_split.aggregation.methods.rolora import RoLoRA
from flower_split.errors import AggregationError
from flower_split.runtime.registry import Registry

METHODS: dict[str, type[Aggregator]] = {
    method.name: method
    for method in (
        FedIT,
        FFALoRA,
        RoLoRA,
        FedSALoRA,
        FLoRA,
        FlexLoRA,
        FLoRIST,
        HetLoRA,
        FedExLoRA,
        LoRAFair,
        FedSB,
        FedSVD,
        RaFLoRA,
        ProductDelta,
    )
}


def _is_method(found: object) -> TypeGuard[type[Aggregator]]:
    return isinstance(found, type) and issubclass(found, Aggregator)


AGGREGATORS: Registry[type[Aggregator]] = Registry(
    group="flower_split.aggregators",
    key="strategy.aggregator",
    form="a subclass of flower_split.aggregation.Aggregator",
    machines="the ServerApp runs",
    built_in=MappingProxyType(METHODS),
    accepts=_is_method,
    error=AggregationError,
)

SERVER_OPTIONS = ("server_optimizer", "beta1", "beta2", "epsilon")


def make_aggregator(
    name: str, max_rank: int | None = None, **options: int | float | str | None
) -> Aggregator:
    """Make the aggregator of that name.

    Args:
        name: As in the literature: ``fedit``, ``flora``, ``product-delta``, …; a plug-in's name, or
            an import path.
        max_rank: The largest rank the server keeps; None: whatever the method needs.
        options: The method's own fields, such as ``learning_rate``.

    Raises:
        AggregationError: No such method, or the method has no such option.
    """
    method = AGGREGATORS.get(name)
    known = [item.name for item in fields(method)]
    for option in options:
        if option in SERVER_OPTIONS and option not in known:
            raise AggregationError(
                f"{name} takes no server optimizer (option {option!r}): it does not keep ΔW itself, "
                "and moments of factors mean nothing once their basis or their mean has changed. "
                'Use "product-delta", "flexlora" or "florist".'
            )
        if option not in known:
            raise AggregationError(
                f"{name} has no option {option!r}; its options are {', '.join(known)}."
            )
    try:
        return method(max_rank=max_rank, **options)  # type: ignore[arg-type]
    except TypeError as error:
        raise AggregationError(f"{name}: an option has the wrong type: {error}") from error
