"""A window rule: no window goes on without the first client."""

from collections.abc import Sequence

from flower_split.trunk.engine.window_rules import WindowMember, WindowRule


class NeedsFirst(WindowRule):
    """Give the round up where slot 0 has left."""

    def refusal(self, window: int, members: Sequence[WindowMember]) -> str:
        """See :class:`WindowRule`."""
        gone = any(member.slot == 0 and member.problem for member in members)
        return "the first client is in every step" if gone else ""
