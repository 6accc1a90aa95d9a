"""The grid of a sweep: keys with several values, and every combination of them as a cell."""

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flower_split.config import Scalar, parse_run_config, run_config_keys
from flower_split.errors import ConfigError
from flower_split.experiments.baselines import has_own_baseline

SEED = "seed"
OURS = ""
"""The name of no baseline: the run itself."""

_AXIS = re.compile(
    r"([\w.-]+)=((?:\"[^\"]*\"|'[^']*'|[^\s,\"'])+(?:,(?:\"[^\"]*\"|'[^']*'|[^\s,\"'])+)*)"
)
_VALUE = re.compile(r"\"[^\"]*\"|'[^']*'|[^,]+")
_UNSAFE = re.compile(r"[^\w.=+-]+")
_EXAMPLE = "Example: --grid 'seed=0,1,2 mode=joint,frozen strategy.aggregator=fedit,flora'."

Axes = Mapping[str, tuple[Scalar, ...]]
"""Key -> its values, in the order given; the first is what the others are compared with."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep."""

    values: tuple[tuple[str, Scalar], ...]  # key -> value of every axis that it depends on
    baseline: str = OURS

    @property
    def name(self) -> str:
        """Return a name that is unique in its sweep, for a directory."""
        pairs = [f"{key}={value}" for key, value in self.values]
        return _UNSAFE.sub("-", "_".join([self.baseline or "ours", *pairs]))

    @property
    def seed(self) -> Scalar | None:
        """Return its seed; None where the sweep has one for all."""
        return dict(self.values).get(SEED)

    @property
    def variant(self) -> tuple[tuple[str, Scalar], ...]:
        """Return what tells it from others but the seed."""
        return tuple((key, value) for key, value in self.values if key != SEED)


def parse_grid(text: str) -> Axes:
    """Read ``key=value,value …``.

    Raises:
        ConfigError: It cannot be read, or a key or value is none of the run config's; names it.
    """
    axes: dict[str, tuple[Scalar, ...]] = {}
    left = _AXIS.sub("", text).split()
    if left:
        raise ConfigError(
            f"--grid must hold KEY=VALUE,VALUE pairs, separated by spaces; {left[0]!r} is none "
            f"(a value with spaces or commas needs quotes). {_EXAMPLE}"
        )
    for key, values in _AXIS.findall(text):
        if key in axes:
            raise ConfigError(f"--grid gives {key} twice. Give all of its values in one list.")
        axes[key] = checked_axis(key, [_scalar(key, word) for word in _VALUE.findall(values)])
    return axes


def checked_axis(key: str, values: Sequence[Scalar]) -> tuple[Scalar, ...]:
    """Return the values of one key, each checked by itself.

    Raises:
        ConfigError: The key is unknown, a value breaks its rule, or comes twice.
    """
    parse_run_config({key: values[0]})  # an unknown key is told with its nearest name
    if len(set(values)) < len(values):
        raise ConfigError(f"--grid gives {key} a value twice: {', '.join(map(str, values))}.")
    return tuple(values)


Settings = Mapping[str, Scalar]
"""Keys of one variant beside the grid, with their values."""


def cells_of(axes: Axes, baselines: Sequence[str], also: Sequence[Settings] = ()) -> list[Cell]:
    """Return all runs of a sweep: every combination of values, further variants, then baselines.

    A baseline takes the first value of the keys that only the federation has.

    Args:
        axes: The grid.
        baselines: By name.
        also: Further variants: each runs with every seed, and elsewhere with the grid's first values.
    """
    cells = [
        Cell(tuple(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]
    seeds: Sequence[tuple[tuple[str, Scalar], ...]] = [
        ((SEED, seed),) for seed in axes.get(SEED, ())
    ] or [()]
    cells += [Cell((*settings.items(), *seed)) for settings in also for seed in seeds]
    own = {key: values for key, values in axes.items() if has_own_baseline(key)}
    for name in baselines:
        cells += [
            Cell(tuple(zip(own, values, strict=True)), name)
            for values in itertools.product(*own.values())
        ]
    return cells


def config_of(cell: Cell, axes: Axes, base: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the flat run config of a cell: ``base``, with first values and then its own on top."""
    first = {key: values[0] for key, values in axes.items()}
    return {**base, **first, **dict(cell.values)}


def _scalar(key: str, word: str) -> Scalar:
    """Read one value: of a key that takes text it needs no quotes."""
    if word[0] in "\"'":
        return word[1:-1]
    if isinstance(run_config_keys().get(key), str):
        return word
    try:
        value = tomllib.loads(f"value = {word}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"--grid: {key} has a value that cannot be read: {word}. {_EXAMPLE}"
        ) from error
    if not isinstance(value, bool | int | float | str):
        raise ConfigError(f"--grid: {key} must have plain values; {word} is none. {_EXAMPLE}")
    return value
