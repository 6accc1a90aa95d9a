"""What operators ask of the engine: where it stands, what it keeps, how much has crossed the wire.

None of the calls waits for the compute thread, but the one that counts key-value caches.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from flower_split.protocol.values import ProcessReport, SlotReport, TrunkStatus
from flower_split.runtime.memory import accelerator_bytes, resident_bytes
from flower_split.runtime.version import __version__
from flower_split.trunk.compute.activations import ActivationCache
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.weight_versions import Versions
from flower_split.trunk.engine.committed_weights import CommittedWeights
from flower_split.trunk.engine.round_index import RoundIndex
from flower_split.trunk.engine.round_state import Round
from flower_split.trunk.engine.unrecorded import UnrecordedForwards
from flower_split.trunk.engine.watching import Pulse, Waits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the engine keeps, to look at."""

    deadline: float  # when the open window expires, on the engine's clock
    num_replies: int  # that the ledger keeps
    activations: ActivationCache | None  # of the round begun last; None: none was
    weight_versions: Versions  # copies for dispatches


class OperatorSide:
    """The engine as operators see it; :class:`TrunkEngine` sets what it works with."""

    epoch: int
    compute: TrunkCompute
    fingerprint: dict[str, str]
    _clock: Callable[[], float]
    _started: float
    _index: RoundIndex
    _weights: CommittedWeights
    _unrecorded: UnrecordedForwards
    _pulse: Pulse
    _waits: Waits

    @property
    def queue_seconds(self) -> float:
        """Return how long the compute thread lets a call wait now; it grows while it is stuck."""
        return self._pulse.seconds

    def status(self) -> TrunkStatus:
        """Return where the trunk stands. Never waits for a forward or a backward."""
        memory = (resident_bytes(), *accelerator_bytes())
        with self._index.changed:
            now, current = self._clock(), self._index.round
            base = TrunkStatus(
                epoch=self.epoch,
                version=self.compute.version,
                experiment=self._weights.experiment,
                fingerprint=self.fingerprint,
                process=self._process(current, now, memory),
                revoked=tuple(sorted(self._index.revoked)),
            )
            if current is None:
                return base
            status = current.described(base)
            return replace(
                status, slots=tuple(self._watched(current, slot, now) for slot in status.slots)
            )

    def cache_bytes(self) -> int:
        """Return the bytes of key-value caches, after freeing those that nobody uses any more."""
        return self._unrecorded.cache_bytes()

    def inspect(self) -> Inspection:
        """Return what the engine keeps, for figures and tests; it must not be changed."""
        with self._index.changed:
            current = self._index.round
            return Inspection(
                self._index.deadline,
                0 if current is None else len(current.ledger) + len(current.step_ends),
                None if current is None else current.activations,
                self._index.dispatches.versions,
            )

    def look(self) -> None:
        """Note who is waited for, and log it where it lasts; the deadline thread calls it."""
        with self._index.changed:
            lines = self._waits.look(self._index.round, self._clock())
        for slot, line in lines:
            logger.info("%s", line, extra={"slot": slot})
        self._pulse.beat()

    def _watched(self, current: Round, report: SlotReport, now: float) -> SlotReport:
        """Return a slot's report with what its call and the others' waiting say of it."""
        seen = current.last_seen.get(report.slot)
        return replace(
            report,
            joined=seen is not None,
            waited_seconds=self._waits.seconds(report.slot, now),
            silent_seconds=0.0 if seen is None else now - seen,
        )

    def _process(
        self, current: Round | None, now: float, memory: tuple[int, int, int]
    ) -> ProcessReport:
        totals = self._index.totals
        return ProcessReport(
            package_version=__version__,
            uptime_seconds=now - self._started,
            round_seconds=0.0 if current is None else now - current.began,
            queue_seconds=self._pulse.seconds,
            resident_bytes=memory[0],
            accelerator_bytes=memory[1],
            accelerator_peak_bytes=memory[2],
            bytes_received=totals.bytes_received,
            bytes_sent=totals.bytes_sent,
            rounds_committed=totals.rounds_committed,
            rounds_aborted=totals.rounds_aborted,
            checkpoint_seconds=totals.checkpoint_seconds,
            compute_seconds=totals.compute_seconds
            + (0.0 if current is None else current.compute_seconds),
        )
