"""The contribution ledger: the same call with the same content has one effect and one reply.

Each call of a micro-batch is named by its slot, window, micro-batch index and kind. The first arrival
runs; a retry that comes while it runs waits for it, and one that comes later gets the stored reply,
bit for bit. The same name with other content is refused.
"""

from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from flower_split.errors import RefusalReason, TrunkRefused

Reply = TypeVar("Reply")


class CallKind(Enum):
    """The two calls of a micro-batch."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class CallName:
    """One call of one micro-batch, within a round."""

    slot: int
    window: int
    micro_batch: int
    kind: CallKind


class Ledger(Generic[Reply]):
    """The calls of one round and their replies. The engine holds its lock around every method."""

    def __init__(self) -> None:
        self._entries: dict[CallName, tuple[bytes, Future[Reply]]] = {}
        self._acknowledged: dict[int, int] = {}  # slot -> windows below this are answered

    def claim(self, name: CallName, digest: bytes) -> tuple[Future[Reply], bool]:
        """The future of this call's reply, and whether the caller must run it.

        Args:
            name: The call.
            digest: Of its content.

        Raises:
            TrunkRefused: The name came before with other content, or its reply has been released.
        """
        if name.window < self._acknowledged.get(name.slot, 0):
            raise TrunkRefused(
                RefusalReason.STALE_VERSION,
                f"slot {name.slot} repeats a {name.kind.value} of window {name.window}, whose replies "
                "it has acknowledged by going on to a later window.",
            )
        entry = self._entries.get(name)
        if entry is None:
            future: Future[Reply] = Future()
            self._entries[name] = (digest, future)
            return future, True
        if entry[0] != digest:
            raise TrunkRefused(
                RefusalReason.DIGEST_MISMATCH,
                f"slot {name.slot} sends other content than before for the {name.kind.value} of window "
                f"{name.window}, micro-batch {name.micro_batch}. A retry must repeat the same bytes.",
            )
        return entry[1], False

    def knows(self, name: CallName) -> bool:
        """Whether this call has arrived before."""
        return name in self._entries

    def forget(self, name: CallName) -> None:
        """A call failed without effect: let a retry run it again."""
        self._entries.pop(name, None)

    def acknowledge(self, slot: int, window: int) -> None:
        """``slot`` has gone on to ``window``: replies of earlier windows are no longer needed."""
        if window <= self._acknowledged.get(slot, 0):
            return
        self._acknowledged[slot] = window
        for name in [n for n in self._entries if n.slot == slot and n.window < window]:
            del self._entries[name]
