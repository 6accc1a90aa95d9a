"""The contribution ledger: the same call with the same content has one effect and one reply.

Each call of a micro-batch is named by its slot, window, micro-batch index and kind. The first arrival
runs; a retry that comes while it runs waits for it, and one that comes later gets the stored reply,
bit for bit. The same name with other content is refused. :class:`Turns` says whose call runs next.
"""

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused, TrunkUnavailable
from flower_split.protocol.values import CallResult

Reply = TypeVar("Reply")

_MAX_CLIENTS = 4096  # that are remembered; those with a call waiting are never forgotten


def reply_of(call: Future[Reply], seconds: float) -> Reply:
    """Wait for the reply of a call that has been claimed.

    Raises:
        TrunkUnavailable: It is not there within ``seconds``.
    """
    try:
        return call.result(timeout=max(0.0, seconds))
    except FutureTimeoutError:
        raise TrunkUnavailable(
            "the deadline passed while the trunk's compute thread had the call."
        ) from None


class CallKind(Enum):
    """The two calls of a micro-batch, and the one that ends an optimizer step."""

    FORWARD = "forward"
    BACKWARD = "backward"
    FINISH_STEP = "end of the step"


@dataclass(frozen=True, slots=True)
class CallName:
    """One call of one micro-batch, within a round."""

    slot: int
    window: int
    micro_batch: int
    kind: CallKind


class Ledger(Generic[Reply]):
    """The calls of one round and their replies. The engine holds its lock around every method.

    Attributes:
        calls: Those that have arrived and are kept, by name; read only.
        held: Bytes of the replies that are kept, by slot; of a call that runs, those it will have.
    """

    def __init__(self) -> None:
        self._entries: dict[CallName, tuple[bytes, Future[Reply], int]] = {}
        self.calls: Collection[CallName] = self._entries
        # Slot -> (window, micro-batch): everything before has been answered.
        self._acknowledged: dict[int, tuple[int, int]] = {}
        self.held: Counter[int] = Counter()

    def __len__(self) -> int:
        """Return how many calls are kept."""
        return len(self._entries)

    def claim(
        self, name: CallName, digest: bytes, num_bytes: int = 0, room: float = math.inf
    ) -> tuple[Future[Reply], bool]:
        """Return the future of this call's reply, and whether the caller must run it.

        Args:
            name: The call.
            digest: Digest of its content.
            num_bytes: Size of its reply.
            room: Bytes that the slot's replies may have.

        Raises:
            TrunkRefused: The name came before with other content, its reply has been released, or
                there is no room for the reply (OVER_BUDGET).
        """
        if (name.window, name.micro_batch) < self._acknowledged.get(name.slot, (0, 0)):
            raise TrunkRefused(
                RefusalReason.STALE_VERSION,
                f"slot {name.slot} repeats the {name.kind.value} of micro-batch {name.micro_batch} in "
                f"window {name.window}, whose reply it has acknowledged.",
            )
        entry = self._entries.get(name)
        if entry is None:
            if self.held[name.slot] + num_bytes > room:
                raise TrunkRefused(
                    RefusalReason.OVER_BUDGET,
                    f"slot {name.slot} has {self.held[name.slot]} bytes of replies that it has not "
                    f"acknowledged, and may have {room:g} beside what else is kept for it "
                    "(trunk.held-memory-per-client). Acknowledge them, or send micro-batches in order.",
                )
            future: Future[Reply] = Future()
            self._entries[name] = (digest, future, num_bytes)
            self.held[name.slot] += num_bytes
            return future, True
        if entry[0] != digest:
            raise TrunkRefused(
                RefusalReason.DIGEST_MISMATCH,
                f"slot {name.slot} sends other content than before for the {name.kind.value} of window "
                f"{name.window}, micro-batch {name.micro_batch}. A retry must repeat the same bytes.",
            )
        return entry[1], False

    def pending(self, slot: int) -> bool:
        """Return whether a call of ``slot`` is still being computed."""
        return any(
            name.slot == slot and not future.done()
            for name, (_, future, _) in self._entries.items()
        )

    def forget(self, name: CallName) -> None:
        """Let a retry run a call again that failed without effect."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.held[name.slot] -= entry[2]

    def acknowledge(self, slot: int, window: int, micro_batch: int = 0) -> None:
        """Release the replies before ``micro_batch`` of ``window``: ``slot`` has them.

        A client says so with a later forward: one of a later window for all windows before, and
        within a long window by the forward's own count.
        """
        here = (window, micro_batch)
        if here <= self._acknowledged.get(slot, (0, 0)):
            return
        self._acknowledged[slot] = here
        for name in [n for n in self._entries if n.slot == slot]:
            if (name.window, name.micro_batch) < here:
                self.held[slot] -= self._entries.pop(name)[2]


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    run: Callable[[], None]
    reply: Future[CallResult]


class Turns:
    """The calls that wait for the compute thread: clients take turns, whatever each has waiting.

    A client with many calls in flight delays another one's call by one call at most, not by all of them.
    The order in which calls compute changes no result: a window is reduced in slot order. Thread-safe:
    a lock of its own, taken last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[_Waiting]] = {}  # by session; none is empty
        self._last: dict[str, int] = {}  # when a session had its turn, in turns
        self._now = 0

    def put(self, session: str, run: Callable[[], None], reply: Future[CallResult]) -> None:
        """Let a call wait; each needs one :meth:`run_next` on the compute thread.

        Args:
            session: The caller's session; its calls keep their order.
            run: Computes, and fulfils ``reply``.
            reply: Failed by :meth:`give_up`, where the call has not begun.
        """
        with self._lock:
            self._waiting.setdefault(session, deque()).append(_Waiting(run, reply))

    def run_next(self) -> None:
        """Run the call of the session whose turn is the longest ago."""
        with self._lock:
            if not self._waiting:
                return  # given up
            session = min(self._waiting, key=lambda item: self._last.get(item, -1))
            calls = self._waiting[session]
            call = calls.popleft()
            if not calls:
                del self._waiting[session]
            if len(self._last) > _MAX_CLIENTS:
                self._last = {item: self._last.get(item, -1) for item in self._waiting}
            self._now += 1
            self._last[session] = self._now
        call.run()

    def give_up(self) -> None:
        """Fail every call that waits: the trunk is shutting down."""
        with self._lock:
            calls = [call for waiting in self._waiting.values() for call in waiting]
            self._waiting.clear()
        for call in calls:
            call.reply.set_exception(RoundAborted("the trunk is shutting down."))
