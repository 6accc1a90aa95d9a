"""What a client asks of the engine that stops early: to plan fewer steps.

It keeps what it has done, and the round's windows go on with the others. One that closes its session
without a word gives its place up.
"""

import threading

from flower_split.trunk.engine.compute_thread import ComputeThread
from flower_split.trunk.engine.round_index import RoundIndex
from flower_split.trunk.engine.settling import Settling


class LeavingSide:
    """The engine as a client sees it that stops; :class:`TrunkEngine` sets what it works with."""

    _changed: threading.Condition
    _index: RoundIndex
    _settling: Settling
    _thread: ComputeThread

    def shorten_plan(self, session: str, epoch: int, planned_steps: int) -> None:
        """Let a client plan fewer optimizer steps than it joined with. Idempotent.

        With the steps that it has done, it is finished: what it did is kept, as if it had planned no
        more, and the micro-batches of a step that is not complete are forgotten.

        Args:
            session: The client's.
            epoch: Epoch of the trunk process.
            planned_steps: Steps in all, from 1, and not fewer than are done.

        Raises:
            TrunkRefused: It is more than the client planned, or less than it has done.
            RoundAborted: The round was given up.
        """
        with self._changed:
            current, member = self._index.member(session, epoch)
        self._thread.do(lambda: self._settling.shorten(current, member.slot, planned_steps))
