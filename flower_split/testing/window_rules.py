"""The contract of a window rule, checked on windows of up to four participants."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from flower_split.testing.failures import ConformanceError, require
from flower_split.trunk.engine.window_rules import WindowMember, WindowRule

_MOST = 4  # participants
_PLANNED = 3  # steps


def check_window_rule(rule: WindowRule) -> None:
    """Check that a rule keeps the contract of :class:`WindowRule`.

    It must say why in a text, say the same when it is asked again, and let every window go on that
    lacks fewer of those whose lack it has allowed.

    Args:
        rule: The rule.

    Raises:
        ConformanceError: It breaks its contract; the first broken clause is named.

    Example:
        >>> from flower_split.testing import check_window_rule
        >>> from flower_split.trunk.engine.window_rules import WindowMember, WindowRule
        >>> class AtMostOneIsMissing(WindowRule):
        ...     def refusal(self, window, members):
        ...         missing = [member.slot for member in members if member.problem]
        ...         return f"{missing} are missing, and one may be" if len(missing) > 1 else ""
        >>> check_window_rule(AtMostOneIsMissing())
    """
    subject = f"window rule {type(rule).__name__}"
    for count in range(2, _MOST + 1):
        for window in (0, _PLANNED - 1):
            _check_windows(rule, subject, window, count)


def _check_windows(rule: WindowRule, subject: str, window: int, count: int) -> None:
    allowed: dict[frozenset[int], bool] = {}
    for missing in _subsets(count):
        members = [_member(slot, window, slot in missing) for slot in range(count)]
        why = _asked(rule, subject, window, members)
        again = _asked(rule, subject, window, members)
        require(why == again, subject, f"say the same when it is asked again; it said {why!r}")
        allowed[missing] = not why
        for fewer in (missing - {slot} for slot in missing):
            require(
                not allowed[missing] or allowed.get(fewer, True),
                subject,
                f"let a window of {count} go on without {sorted(fewer)} where it lets one go on "
                f"without {sorted(missing)}",
            )


def _subsets(count: int) -> Iterator[frozenset[int]]:
    """Return who may be missing: somebody, and not everybody; smaller sets first."""
    for size in range(1, count):
        yield from map(frozenset, combinations(range(count), size))


def _member(slot: int, window: int, missing: bool) -> WindowMember:
    return WindowMember(
        slot=slot,
        problem="it was silent for 120 s, so its lease ended" if missing else "",
        planned_steps=None if missing and window == 0 else _PLANNED,
        steps_done=window,
        num_tokens=100.0 * window * (slot + 1),
    )


def _asked(rule: WindowRule, subject: str, window: int, members: Sequence[WindowMember]) -> str:
    try:
        why = rule.refusal(window, members)
    except Exception as error:  # whatever a plug-in raises is the finding
        raise ConformanceError(
            f"{subject} must answer for every window; it raised {type(error).__name__}: {error}"
        ) from error
    require(isinstance(why, str), subject, f"say why in a text; it said {why!r}")
    return why
