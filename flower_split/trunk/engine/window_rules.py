"""Rules by which a window may go on without somebody, by name: an extension point of the trunk.

A window is complete when every participant has given what it planned; no rule changes that, nor what
counts once. A rule is asked where somebody has left (by a deadline, a lease, a fault, or its own word),
and only after the quorum has let the window go on: it can give the round up, never lower the quorum.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeGuard

from flower_split.errors import ConfigError
from flower_split.runtime.registry import Registry

if TYPE_CHECKING:  # windows.py asks the rule
    from flower_split.trunk.engine.windows import Slot


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowMember:
    """One participant of the window that is open, as a rule sees it."""

    slot: int
    problem: str  # why it no longer takes part; empty: it does
    planned_steps: int | None  # of the round; None: it has not joined
    steps_done: int  # windows that have everything from it
    num_tokens: float  # label tokens that it has given in the round


class WindowRule(ABC):
    """Whether a window goes on without those who have left; group ``flower_split.window_rules``.

    An instance is made without arguments when the trunk starts, and asked for every such window of
    every training round, by several threads, with the engine's lock held: it must be quick, wait for
    nothing, keep no state, and depend on its arguments alone. What it raises gives the round up.
    """

    @abstractmethod
    def refusal(self, window: int, members: Sequence[WindowMember]) -> str:
        """Say why the window must not go on without the missing; empty: it may.

        Args:
            window: The optimizer step within the round, from 0.
            members: All of the window's, in the order of slots; somebody has a problem, and enough
                for the quorum have none. Somebody who is there more never makes a rule refuse.
        """


class QuorumAlone(WindowRule):
    """``trunk.quorum`` and ``trunk.quorum-count`` decide alone."""

    def refusal(self, window: int, members: Sequence[WindowMember]) -> str:
        """Return that it may go on."""
        return ""


def _is_rule(found: object) -> TypeGuard[type[WindowRule]]:
    return isinstance(found, type) and issubclass(found, WindowRule)


WINDOW_RULES: Registry[type[WindowRule]] = Registry(
    group="flower_split.window_rules",
    key="trunk.window-rule",
    form="a subclass of flower_split.trunk.engine.window_rules.WindowRule",
    machines="the trunk runs",
    built_in=MappingProxyType({"quorum": QuorumAlone}),
    accepts=_is_rule,
    error=ConfigError,
)


def make_window_rule(name: str) -> WindowRule:
    """Return a rule by its name.

    Args:
        name: ``quorum``, an entry point's, or an import path ``"module:Class"``.

    Raises:
        ConfigError: It is unknown, cannot be imported, or is no rule that can be made without
            arguments.
    """
    made = WINDOW_RULES.get(name)
    try:
        return made()
    except Exception as error:  # a plug-in may raise anything, and be abstract still
        raise ConfigError(
            f"trunk.window-rule {name!r} cannot be made without arguments: "
            f"{type(error).__name__}: {error}. Correct the plug-in."
        ) from error


def why_given_up(
    window: int, members: "Sequence[tuple[int, Slot]]", quorum: float, rule: WindowRule | None
) -> str:
    """Return why the round is given up for those who have left a window; empty: it goes on.

    Args:
        window: The open one.
        members: Its slots, those who have left included.
        quorum: Share of them that must be there.
        rule: Asked where the quorum is met and somebody has left; None: nobody is.
    """
    there = sum(not state.dropped for _, state in members)
    needed = math.ceil(quorum * len(members) - 1e-9)
    missing = "; ".join(f"slot {slot}: {state.dropped}" for slot, state in members if state.dropped)
    if there < needed:
        return (
            f"window {window} needs {needed} of its {len(members)} participants (quorum {quorum:g}) and "
            f"has {there} ({missing}). Look at the logs of the clients named, raise trunk.window-timeout "
            "or trunk.join-timeout if they are slow, or lower trunk.quorum to go on without them."
        )
    why = _refusal(rule, window, members) if rule is not None and missing else ""
    if not why:
        return ""
    return (
        f"window {window} does not go on without {missing}: {why.rstrip('.')} (trunk.window-rule, "
        f"{type(rule).__name__}). Look at the logs of the clients named, or use another rule."
    )


def _refusal(rule: WindowRule, window: int, slots: "Sequence[tuple[int, Slot]]") -> str:
    members = [
        WindowMember(
            slot=slot,
            problem=state.dropped,
            planned_steps=state.planned_steps,
            steps_done=state.steps_done,
            num_tokens=state.num_tokens,
        )
        for slot, state in slots
    ]
    try:
        return rule.refusal(window, members)
    except Exception as error:  # a plug-in's fault may end a round, never the trunk's thread
        return f"it failed with {type(error).__name__}: {error}"
