"""Several experiments at once on one trunk: an engine each, over one base and one device.

An experiment is looked up under the coordinator that began it: what another one's is called is nobody's to
learn, and *not yours* and *no such* are one answer.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

from flower_split.errors import RefusalReason, TrunkRefused, TrunkUnavailable
from flower_split.protocol.values import ExperimentReport, ProcessReport, TrunkStatus
from flower_split.runtime.closing import Closing
from flower_split.runtime.memory import accelerator_bytes, resident_bytes
from flower_split.runtime.version import __version__
from flower_split.trunk.compute.checks import printable
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.experiments import Values
from flower_split.trunk.engine.sessions import new_epoch

logger = logging.getLogger(__name__)

_MAX_NAME = 80  # characters; they become a directory's name
_CHANGING_SECONDS = 120.0  # that one waits while another one is made or let go
_ENGINE_KEYS = (
    "lora.",
    "trunk.",
    "seed",
    "mode",
)  # begin the names of settings that make an engine

Make = Callable[[str, Values | None], TrunkEngine]
"""Makes the engine of a new experiment, of a coordinator, with what its run brings."""


@dataclass(slots=True, eq=False)
class _Held:
    """An experiment that is served."""

    owner: str
    name: str
    engine: TrunkEngine
    values: Values | None  # as the run brought them, as far as they make an engine
    heard: float  # when its coordinator spoke last

    @property
    def label(self) -> str:
        """The name that logs and figures use."""
        return f"{self.owner}/{self.name}" if self.owner else self.name


class SeveralExperiments(Closing):
    """Several engines at once, each for one experiment.

    Args:
        make: Makes an engine.
        fingerprint: Fingerprint of the trunk's configuration; says what base the experiments share.
        maximum: Experiments at once, of all coordinators.
        lease_seconds: Without a word of its coordinator, or a call of its clients, after which an
            experiment is let go. What it has committed stays on disk, and its next round brings it back.
        clock: Monotonic seconds; tests pass their own.

    Attributes:
        epoch: Epoch of this process.
    """

    def __init__(
        self,
        make: Make,
        fingerprint: Mapping[str, str],
        *,
        maximum: int,
        lease_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.maximum = maximum
        self.epoch = new_epoch()
        self._make = make
        self._fingerprint = dict(fingerprint)
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._started = clock()
        # Held while one is made or let go; never while a call is served. The mapping is replaced, never
        # changed, so that it is read without the lock.
        self._changing = threading.Lock()
        self._held: Mapping[tuple[str, str], _Held] = MappingProxyType({})

    def check_tokens(self, owner: str, name: str, tokens: Collection[str]) -> None:
        """See :meth:`Experiments.check_tokens`."""
        mine = self._held.get((owner, name))
        others = [held.engine for held in self._held.values() if held is not mine]
        if any(engine.knows_token(token) for token in tokens for engine in others):
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                "BeginRound: a participant has a token in use. Draw one for every client and round.",
            )

    def begin(self, owner: str, name: str, values: Values | None) -> TrunkEngine:
        """See :meth:`Experiments.begin`."""
        if not 0 < len(name) <= _MAX_NAME:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"an experiment's name must have 1 to {_MAX_NAME} characters; it has {len(name)}.",
            )
        asked = _of_engine(values)
        held = self._held.get((owner, name))
        if held is None or held.values != asked:
            held = self._renewed(owner, name, values, asked)
        held.heard = self._clock()
        return held.engine

    def named(self, owner: str, name: str) -> TrunkEngine:
        """See :meth:`Experiments.named`."""
        held = self._held.get((owner, name))
        if held is None and not name:
            mine = [item for item in self._held.values() if item.owner == owner]
            if len(mine) > 1:
                raise TrunkRefused(
                    RefusalReason.INVALID_REQUEST,
                    f"the trunk serves {len(mine)} experiments of yours: name one (--experiment).",
                )
            held = next(iter(mine), None)
        if held is None:
            raise TrunkRefused(
                RefusalReason.WRONG_ATTEMPT,
                f"the trunk serves no experiment {printable(name)[:_MAX_NAME]!r} of yours: it ended, was "
                "let go, or the trunk has restarted. Its next round brings it back.",
            )
        return held.engine

    def of_token(self, token: str) -> TrunkEngine | None:
        """See :meth:`Experiments.of_token`."""
        for held in self._held.values():
            if held.engine.knows_token(token):
                return held.engine
        return None

    def knows_token(self, token: str) -> bool:
        """See :meth:`Experiments.knows_token`."""
        return self.of_token(token) is not None

    def engines(self) -> Mapping[str, TrunkEngine]:
        """See :meth:`Experiments.engines`."""
        return {held.label: held.engine for held in self._held.values()}

    def heard(self, owner: str, name: str) -> None:
        """See :meth:`Experiments.heard`."""
        held = self._held.get((owner, name))
        if held is not None:
            held.heard = self._clock()

    def keep_alive(self, owner: str, name: str) -> None:
        """See :meth:`Experiments.keep_alive`."""
        held = self._held.get((owner, name))
        if held is not None:
            held.heard = self._clock()
            held.engine.keep_alive()

    def end(self, owner: str, name: str) -> None:
        """See :meth:`Experiments.end`."""
        held = self._held.get((owner, name))
        if held is not None:
            with self._change():
                self._let_go(held, "its coordinator ended it")

    def expire(self) -> None:
        """Let go of experiments whose coordinators are silent, and whose clients are, too."""
        now = self._clock()
        for held in list(self._held.values()):
            if now - held.heard >= self._lease_seconds and not self._has_clients(held):
                with self._change():
                    self._let_go(
                        held, f"its coordinator has said nothing for {now - held.heard:.0f} s"
                    )

    def statuses(self) -> dict[str, TrunkStatus]:
        """Return where every experiment stands, by what figures call it."""
        return {held.label: held.engine.status() for held in self._held.values()}

    def status(self, owner: str = "", name: str = "") -> TrunkStatus:
        """See :meth:`Experiments.status`."""
        held = self._held.get((owner, name))
        mine = [item for item in self._held.values() if item.owner == owner]
        reports = tuple(self._report(item) for item in mine)
        base = self._whole() if held is None else held.engine.status()
        return replace(base, max_experiments=self.maximum, experiments=reports)

    @property
    def queue_seconds(self) -> float:
        """See :meth:`Experiments.queue_seconds`."""
        return max((held.engine.queue_seconds for held in self._held.values()), default=0.0)

    def close(self, why: str = "the trunk is shutting down") -> None:
        """End all engines; whoever waits is told that the round is over, and why."""
        with self._change():
            for held in list(self._held.values()):
                self._let_go(held, why)

    def _renewed(self, owner: str, name: str, values: Values | None, asked: Values | None) -> _Held:
        """Return a new experiment, or one with other settings than before."""
        with self._change():
            held = self._held.get((owner, name))
            if held is not None and held.values == asked:
                return held  # somebody else was faster
            if held is not None:
                self._let_go(held, "its coordinator begins it with other settings")
            if len(self._held) >= self.maximum:
                raise TrunkRefused(
                    RefusalReason.OVER_BUDGET,
                    f"the trunk serves {len(self._held)} experiments, as many as it may "
                    "(trunk.max-experiments). Wait for one to end, or free one whose run has gone: "
                    "flower-split trunk-release ADDRESS --token-file FILE --experiment NAME.",
                )
            held = _Held(owner, name, self._make(owner, values), asked, self._clock())
            self._held = MappingProxyType({**self._held, (owner, name): held})
            logger.info(
                "experiment %s begins, as %d of %d",
                printable(held.label),
                len(self._held),
                self.maximum,
            )
            return held

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Make or let go of experiments, one at a time.

        Raises:
            TrunkUnavailable: Another one is being made or let go for too long.
        """
        if not self._changing.acquire(timeout=_CHANGING_SECONDS):
            raise TrunkUnavailable(
                f"the trunk has been making or releasing another experiment for {_CHANGING_SECONDS:.0f} s."
            )
        try:
            yield
        finally:
            self._changing.release()

    def _let_go(self, held: _Held, why: str) -> None:
        """Close an experiment's engine. ``_changing`` is held."""
        key = (held.owner, held.name)
        if self._held.get(key) is not held:
            return
        self._held = MappingProxyType({k: v for k, v in self._held.items() if k != key})
        logger.info("experiment %s is let go: %s", printable(held.label), why)
        held.engine.close(why)

    def _has_clients(self, held: _Held) -> bool:
        status = held.engine.status()
        calls = [slot.silent_seconds for slot in status.slots if slot.joined]
        return status.phase not in ("idle", "aborted") and min(calls, default=1e9) < (
            self._lease_seconds
        )

    def _report(self, held: _Held) -> ExperimentReport:
        status = held.engine.status()
        return ExperimentReport(
            name=held.name,
            phase=status.phase,
            server_round=status.server_round,
            attempt=status.attempt,
            version=status.version,
            num_tokens=status.num_tokens,
            participants=len(status.slots),
            compute_seconds=status.process.compute_seconds,
            silent_seconds=self._clock() - held.heard,
        )

    def _whole(self) -> TrunkStatus:
        """Return the status of the process."""
        each = [held.engine.status().process for held in self._held.values()]
        now, peak = accelerator_bytes()
        return TrunkStatus(
            epoch=self.epoch,
            version=0,
            fingerprint=self._fingerprint,
            process=ProcessReport(
                package_version=__version__,
                uptime_seconds=self._clock() - self._started,
                queue_seconds=self.queue_seconds,
                resident_bytes=resident_bytes(),
                accelerator_bytes=now,
                accelerator_peak_bytes=peak,
                bytes_received=sum(item.bytes_received for item in each),
                bytes_sent=sum(item.bytes_sent for item in each),
                rounds_committed=sum(item.rounds_committed for item in each),
                rounds_aborted=sum(item.rounds_aborted for item in each),
                checkpoint_seconds=sum(item.checkpoint_seconds for item in each),
                compute_seconds=sum(item.compute_seconds for item in each),
            ),
        )


def _of_engine(values: Values | None) -> Values | None:
    """Return what makes an engine of what a run brings; the rest may change when it is resumed."""
    if values is None:
        return None
    return {key: value for key, value in values.items() if key.startswith(_ENGINE_KEYS)}
