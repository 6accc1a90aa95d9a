"""The trail of refused calls: one line a second at most, and counts of all."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from flower_split.errors import FlowerSplitError, RefusalReason
from flower_split.trunk.service.audit_log import AuditLog, reason_of

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 1.0  # between two lines, so that a flood of calls is no flood of lines


class RefusalLog:
    """Logs refused calls by peer, method and reason; never tokens, tensors or message texts.

    Thread-safe: a lock of its own, under which nothing else is locked.

    Args:
        clock: Monotonic seconds; tests pass their own.
        audit: Where every call is noted; None: nowhere.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, audit: AuditLog | None = None
    ) -> None:
        self._clock = clock
        self.audit = audit
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()  # by method and reason
        self._silent = 0  # refusals since the last line
        self._next_line = -float("inf")

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """Return how many calls were refused, by method and reason."""
        with self._lock:
            return dict(self._counts)

    def note(self, peer: str, method: str, error: FlowerSplitError) -> None:
        """Count a refused call, and log it unless another one was logged a moment ago."""
        reason = reason_of(error)
        if not reason:
            return  # the round was given up, or the trunk is busy: no fault of the caller
        with self._lock:
            self._counts[method, reason] += 1
            now = self._clock()
            if now < self._next_line:
                self._silent += 1
                return
            silent, self._silent = self._silent, 0
            self._next_line = now + _QUIET_SECONDS
            total = self._counts.total()
        level = logging.WARNING if reason == RefusalReason.UNAUTHENTICATED.name else logging.INFO
        logger.log(
            level,
            "refused %s from %s: %s (%d more since the last line, %d in all)",
            method,
            peer,
            reason,
            silent,
            total,
        )
