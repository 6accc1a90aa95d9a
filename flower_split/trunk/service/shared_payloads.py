"""Memory that the trunk shares with clients of its own host and user, one piece per token.

A client asks for it before its first call with tensors. A piece is given up when the client closes its
session, and at the latest when its token is no longer known and another client asks.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator

from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.sending import Outgoing
from flower_split.wire.shared_memory import SharedMemory, host_identity

logger = logging.getLogger(__name__)

PAYLOAD_BYTES = 1 << 30  # of each direction of one client; pages take memory when they are used


class SharedPayloads:
    """The pieces of memory by token. Thread-safe: a lock of its own, taken last.

    Args:
        knows_token: Whether a participant still has this token. Needs no lock.
    """

    def __init__(self, knows_token: Callable[[str], bool]) -> None:
        self._knows_token = knows_token
        self._lock = threading.Lock()
        self._pieces: dict[str, SharedMemory] = {}

    def offer(self, request: pb.ShareMemoryRequest, token: str) -> pb.ShareMemoryReply:
        """Return what a client opens the memory with; a process of 0 says that there is none.

        Safe to retry: the same token gets the same memory.

        Args:
            request: Says on which host, and as which user, the client runs.
            token: Of the call.
        """
        mine = host_identity()
        if not mine[0] or (request.boot_id, request.user) != mine:
            return pb.ShareMemoryReply()
        with self._lock:
            for other in [t for t in self._pieces if t != token and not self._knows_token(t)]:
                self._pieces.pop(other).close_file()
            piece = self._pieces.get(token)
            if piece is None:
                try:
                    piece = self._pieces[token] = SharedMemory.make(PAYLOAD_BYTES)
                except OSError as error:
                    logger.warning("no memory can be shared with a client: %s", error)
                    return pb.ShareMemoryReply()
        return pb.ShareMemoryReply(
            process=os.getpid(),
            descriptor=piece.descriptor,
            num_bytes=piece.num_bytes,
            nonce=piece.nonce,
        )

    def of(self, token: str) -> SharedMemory | None:
        """Return the memory shared with a client; None: there is none."""
        with self._lock:
            return self._pieces.get(token)

    def drop(self, token: str) -> None:
        """Give a client's memory up; tensors over it keep it as long as they live. Idempotent."""
        with self._lock:
            piece = self._pieces.pop(token, None)
        if piece is not None:
            piece.close_file()

    def count(self) -> int:
        """Return how many pieces there are."""
        with self._lock:
            return len(self._pieces)


def placed_frames(memory: SharedMemory, reply: Outgoing) -> Iterator[bytes]:
    """Return the frames of a reply whose payloads go into shared memory, if there is room."""
    place = memory.sending.put(reply.payloads) if reply.payloads else None
    if place is None:
        return reply.frames()
    memory.sending.answered(place)  # free once the client has opened it and let go of it
    return reply.placed(place).frames()
