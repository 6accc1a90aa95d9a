"""The methods by name."""

import difflib
from dataclasses import fields

from flower_split.aggregation.base import Aggregator
from flower_split.aggregation.fedit import FedIT
from flower_split.aggregation.product_delta import ProductDelta
from flower_split.errors import AggregationError

METHODS: dict[str, type[Aggregator]] = {
    method.name: method
    for method in (
        FedIT,
        ProductDelta,
    )
}


def make_aggregator(
    name: str, max_rank: int | None = None, **options: int | float | str | None
) -> Aggregator:
    """The aggregator of that name.

    Args:
        name: As in the literature: ``fedit``, ``flora``, ``product-delta``, …; see ``METHODS``.
        max_rank: The largest rank the server keeps; None: whatever the method needs.
        options: The method's own fields, such as ``learning_rate``.

    Raises:
        AggregationError: No such method, or the method has no such option.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise AggregationError(
            f"strategy.aggregator {name!r} is unknown; it must be one of {', '.join(METHODS)}.{hint}"
        )
    method = METHODS[name]
    known = [item.name for item in fields(method)]
    for option in options:
        if option not in known:
            raise AggregationError(
                f"{name} has no option {option!r}; its options are {', '.join(known)}."
            )
    return method(max_rank=max_rank, **options)  # type: ignore[arg-type]
