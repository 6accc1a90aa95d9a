"""Watch one phase while its clients work: progress lines, and an early end."""

import logging
import time
from collections.abc import Sequence

from flwr.app import Message

from flower_split.errors import TrunkError
from flower_split.protocol.values import TrunkStatus
from flower_split.server.federation.nodes import describe
from flower_split.server.trunk_access import TrunkHealth
from flower_split.server.trunk_phase import TrunkPhase
from flower_split.server.trunk_rounds import TrunkRounds

logger = logging.getLogger(__name__)

_STATUS_SECONDS = 2.0  # between two polls of the trunk's status
_MISSED_SECONDS = 10.0  # that clients are waited for before progress names them
_GRACE_SECONDS = 20.0  # for the other clients' replies, once a phase can no longer succeed


class PhaseWatch:
    """Log the progress of one phase, and end it as soon as it can no longer succeed.

    Args:
        phase: The open phase.
        trunk_rounds: The trunk's rounds; the phase's round is aborted where it must end.
        health: How the trunk process is watched.
        label: Begins every progress line, such as ``round 2/3``.
    """

    def __init__(
        self, phase: TrunkPhase, trunk_rounds: TrunkRounds, health: TrunkHealth, label: str
    ) -> None:
        self._phase = phase
        self._trunk_rounds = trunk_rounds
        self._health = health
        self._label = label
        self._replies: list[Message] = []
        self._start = self._polled = time.monotonic()
        self._end = float("inf")
        self._shown = ""

    def __call__(self, new: Sequence[Message]) -> bool:
        """Take new replies in; return whether the wait is over.

        See :data:`flower_split.server.federation.exchange.Watch`.
        """
        self._replies += new
        now = time.monotonic()
        if new and not self._ending:
            self._check_failures(now)
        if now - self._polled >= _STATUS_SECONDS:
            self._polled = now
            self._poll(now)
        return now >= self._end

    @property
    def _ending(self) -> bool:
        """Return whether the phase has failed, and only the grace time of the others is left."""
        return self._end != float("inf")

    def _check_failures(self, now: float) -> None:
        failed = self._phase.failures(self._replies)
        if failed and not self._phase.can_succeed(failed):
            self._phase.mark_failed(failed)
            self._stop(describe(failed, self._phase.federation), now)

    def _poll(self, now: float) -> None:
        """Read the trunk's status, log progress, and end the phase where its round is gone."""
        if not self._health.is_running():
            # Serving again at once, it tells the clients that wait for it that their round is over.
            self._mark_lost("the trunk process ended; its last log lines say why", now)
            self._health.ensure_running()
            return
        try:
            status = self._trunk_rounds.status()
        except TrunkError as error:
            logger.warning("%s the trunk does not report its status: %s", self._label, error)
            return
        if status.epoch != self._trunk_rounds.epoch and not self._ending:
            self._mark_lost("the trunk restarted", now)
            return
        if status.phase == "aborted" and not self._ending:
            why = f"the trunk gave the round up: {status.problem}"
            self._phase.mark_stopped(why)
            self._stop(why, now)
            return
        line = self._progress(status, now)
        if line != self._shown:
            self._shown = line
            logger.info("%s", line)

    def _progress(self, status: TrunkStatus, now: float) -> str:
        megabytes = (status.bytes_received + status.bytes_sent) / 1e6
        if self._phase.evaluate:
            done = f"{len(self._replies)} of {len(self._phase.partition_ids)} clients"
            return f"{self._label} evaluating: {done} done, {megabytes:.1f} MB"
        if status.phase == "joining":
            return f"{self._label} clients are joining{_missing(status)}"
        rate = status.num_tokens / max(now - self._start, 1e-9)
        steps = self._trunk_rounds.steps_per_round
        # The trunk's windows count its optimizer steps: none while it is frozen, one at the end of a
        # round with a window per round. The tokens that it has seen move in every mode.
        done = f"step {min(status.window, steps)}/{steps}"
        if status.window == 0 and status.num_tokens:
            done = f"{status.num_tokens:.0f} label tokens done"
        return f"{self._label} {done} {rate:.0f} tokens/s {megabytes:.1f} MB{_missing(status)}"

    def _mark_lost(self, why: str, now: float) -> None:
        """End the phase whose trunk is gone: whoever has not answered has lost the round."""
        if not self._ending:
            logger.warning("%s: %s", self._label, why)
            self._phase.mark_lost(why)
            self._end = now + _GRACE_SECONDS

    def _stop(self, why: str, now: float) -> None:
        """Abort the trunk's round, so that its clients end at once; their replies are still read."""
        logger.warning("%s can no longer succeed: %s", self._label, why)
        self._trunk_rounds.abort(why)
        self._end = now + _GRACE_SECONDS


def _missing(status: TrunkStatus) -> str:
    """Say whom the others wait for, and since when, as the end of a progress line."""
    late = [slot for slot in status.slots if slot.waited_seconds >= _MISSED_SECONDS]
    if not late:
        return ""
    clients = ", ".join(str(slot.slot) for slot in late)
    seconds = max(slot.waited_seconds for slot in late)
    return f", waiting for client {clients} since {seconds:.0f} s"
