"""The trail of refused calls: one line a second at most, and counts of all."""

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable

import grpc

from flower_split.errors import FlowerSplitError, RefusalReason
from flower_split.trunk.service.audit_log import AuditLog, Told, event_of, reason_of
from flower_split.trunk.service.pacing import PARTICIPANT, Pace, Rate
from flower_split.wire.grpc_status import REFUSAL_KEY, status_of

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 1.0  # between two lines, so that a flood of calls is no flood of lines


def _nobodys(token: str) -> str:
    return ""


class RefusalLog:
    """Logs refused calls by peer, method and reason; never tokens, tensors or message texts.

    Thread-safe: a lock of its own, under which nothing else is locked.

    Args:
        clock: Monotonic seconds; tests pass their own.
        audit: Where every call is noted; None: nowhere.
        participant: How fast each participant's calls are refused.

    Attributes:
        experiment_of: Returns whose token it is, where there are several experiments; for the audit log.
        pace: How fast calls are refused; the log's owner closes it.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        audit: AuditLog | None = None,
        participant: Rate = PARTICIPANT,
    ) -> None:
        self._clock = clock
        self.audit = audit
        self.experiment_of: Callable[[str], str] = _nobodys
        self.pace = Pace(clock, participant)
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()  # by method and reason
        self._silent = 0  # refusals since the last line
        self._next_line = -float("inf")

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """Return how many calls were refused, by method and reason."""
        with self._lock:
            return dict(self._counts)

    def tell(self, call: Told, error: BaseException | None) -> None:
        """Note in the audit log how a call ended, where there is one."""
        if self.audit is not None:
            experiment = "" if call.token is None else self.experiment_of(call.token)
            self.audit.note(event_of(call, error, experiment))

    def end_call(
        self, context: grpc.ServicerContext, method: str, error: BaseException, token: str
    ) -> None:
        """End a call with the status of what it raised; raises what gRPC's ``abort`` does.

        Args:
            context: The call's gRPC context.
            method: Its name.
            error: One that nobody expects is INTERNAL, and its log entry has the incident's number.
            token: As for :meth:`note`.
        """
        if isinstance(error, FlowerSplitError):
            code, text, refusal = status_of(error)
            if refusal is not None:
                context.set_trailing_metadata(((REFUSAL_KEY, refusal.SerializeToString()),))
            logger.debug("%s: %s, %s", method, code.name, text)
            self.note(context.peer(), method, error, token)
            context.abort(code, text)
        elif isinstance(error, Exception) and not isinstance(error, grpc.RpcError):
            # (An RpcError: the client has gone; nobody is there to be told.)
            incident = secrets.token_hex(4)
            logger.error("%s failed, incident %s", method, incident, exc_info=error)
            text = f"the trunk failed at {method}; its log says why under incident {incident}."
            context.abort(grpc.StatusCode.INTERNAL, text)

    def note(self, peer: str, method: str, error: FlowerSplitError, token: str = "") -> None:
        """Count a refused call, and log it unless another one was logged a moment ago.

        Args:
            peer: Its address.
            method: Its name.
            error: What it is answered with.
            token: A participant's, whose next calls are refused unread where it has too many such;
                empty: the refusal has been counted there.
        """
        reason = reason_of(error)
        if not reason:
            return  # the round was given up, or the trunk is busy: no fault of the caller
        if token:
            self.pace.count(token)
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
