"""Several things timed in turns, so that a machine's load meets all of them alike."""

import time
from collections.abc import Callable, Mapping

WARM_UP = 2  # turns that do not count


def in_turns(
    ways: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = WARM_UP
) -> dict[str, tuple[float, ...]]:
    """Return the seconds of every way, by name.

    Args:
        ways: Called one after the other, then all again.
        repeats: Turns that count.
        warm_up: Turns before them that do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm_up + repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            taken = time.perf_counter() - began
            if turn >= warm_up:
                seconds[name].append(taken)
    return {name: tuple(kept) for name, kept in seconds.items()}
