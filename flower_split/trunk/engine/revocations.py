"""Clients that an operator took out of an experiment while it runs.

The token of a slot that is revoked is unknown at once, so that nothing more of its client is let in;
the round goes on without it, or is given up, as ``trunk.on-bad-client`` and the quorum say. It stays out
in later attempts and rounds of the experiment, until the trunk's process ends.
"""

import logging
from collections.abc import Sequence

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.trunk.engine.round_index import RoundIndex, hashed
from flower_split.trunk.engine.round_state import Round
from flower_split.trunk.engine.settling import Settling

logger = logging.getLogger(__name__)

_WHY = "an operator revoked its client (flower-split trunk-revoke)"


class Revocations:
    """The slots that are out. Only the compute thread calls its methods.

    Args:
        index: Finds the open round and the dispatches; holds the engine's lock.
        settling: Goes on without them.
    """

    def __init__(self, index: RoundIndex, settling: Settling) -> None:
        self._index = index
        self._settling = settling
        self._experiment = ""  # that the slots are out of

    def revoke(self, slots: Sequence[int], tokens: Sequence[str]) -> list[int]:
        """Take slots out, by number or by a token of theirs; return them all. Safe to retry.

        Raises:
            TrunkRefused: No round was begun, or it has no such participant; nothing has changed.
        """
        with self._index.changed:
            current = self._index.round
            if current is None:
                raise TrunkRefused(
                    RefusalReason.NO_ROUND, "no round was begun on the trunk: nobody takes part."
                )
            self._follow(current)
            taking_part = dict(current.slots_by_token)
            for dispatch in self._index.dispatches.at_work.values():
                taking_part |= dispatch.slots_by_token
            named = {taking_part[key] for key in map(hashed, tokens) if key in taking_part}
            named |= set(slots)
            strange = named - set(taking_part.values()) - self._index.revoked
            if strange or not named:
                raise TrunkRefused(
                    RefusalReason.INVALID_REQUEST,
                    f"{f'slots {sorted(strange)} are' if strange else 'that client is'} not among the "
                    f"participants of {current}, which are slots {sorted(set(taking_part.values()))}. "
                    "flower-split status shows them.",
                )
            self._index.revoked |= named
        self.apply(current)
        return sorted(named)

    def apply(self, current: Round) -> None:
        """Go on without the revoked slots in the round that was begun last."""
        with self._index.changed:
            self._follow(current)
            out = self._index.revoked
            for dispatch in self._index.dispatches.at_work.values():
                if dispatch.slot in out and not dispatch.over:
                    dispatch.drop(dispatch.slot, _WHY, self._index.clock())
            held = sorted(out.intersection(current.slots_by_token.values()))
        for slot in held:
            logger.warning("%s: slot %d is out: %s", current, slot, _WHY, extra={"slot": slot})
            if not current.plan.evaluate:  # an evaluation misses it, and needs nobody in particular
                self._settling.take_out(current, slot, _WHY)
        with self._index.changed:
            self._index.changed.notify_all()

    def _follow(self, current: Round) -> None:
        """Let everybody in again where another experiment has begun."""
        if current.plan.experiment != self._experiment:
            self._experiment, self._index.revoked = current.plan.experiment, frozenset()
