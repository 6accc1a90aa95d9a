"""The robust rules and weightings by name, as a configuration gives them."""

from collections.abc import Callable

from flower_split.aggregation.rules.coordinate_wise import Median, TrimmedMean
from flower_split.aggregation.rules.krum import Krum, MultiKrum
from flower_split.aggregation.rules.norm_clipping import NormClipping
from flower_split.aggregation.rules.rule import ClampWeights, Rule, UniformWeights
from flower_split.errors import AggregationError


def parse_rules(text: str) -> tuple[Rule, ...]:
    """The rules that a configuration names, in their order.

    Args:
        text: Comma-separated ``name`` or ``name=value``: ``uniform``, ``clamp-weights=10``,
            ``norm-clipping=1.0``, ``trimmed-mean=0.2``, ``median``, ``krum=1`` (malicious clients)
            or ``multi-krum=1`` (keeps all but those). Empty: none.

    Raises:
        AggregationError: A name is unknown, or its value is missing or wrong.
    """
    return tuple(_parse_rule(item.strip()) for item in text.split(",") if item.strip())


def _parse_rule(item: str) -> Rule:
    name, equals, value = (part.strip() for part in item.partition("="))
    makers: dict[str, Callable[[float], Rule]] = {
        "clamp-weights": lambda number: ClampWeights(ratio=number),
        "norm-clipping": lambda number: NormClipping(max_norm=number),
        "trimmed-mean": lambda number: TrimmedMean(trim=number),
        "krum": lambda number: Krum(malicious=_whole(item, number)),
        "multi-krum": lambda number: MultiKrum(malicious=_whole(item, number)),
    }
    plain: dict[str, Callable[[], Rule]] = {"uniform": UniformWeights, "median": Median}
    if name in plain and not equals:
        return plain[name]()
    if name not in makers or not equals:
        raise AggregationError(
            f"robust rule {item!r} is unknown; it must be uniform or median, or one of "
            f"{', '.join(makers)} with =number."
        )
    try:
        number = float(value)
    except ValueError:
        raise AggregationError(f"robust rule {item!r} needs a number after the =.") from None
    return makers[name](number)


def _whole(item: str, number: float) -> int:
    if not number.is_integer():
        raise AggregationError(f"robust rule {item!r} needs a whole number of clients.")
    return int(number)
