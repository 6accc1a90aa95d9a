"""Memory that the trunk shares with clients of its own host and user, one piece per token.

A client asks for it before its first call with tensors. A piece is given up when the client closes its
session, and at the latest when its token is no longer known and another client asks.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator

import torch

from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.device_memory import DeviceBuffer, device_name
from flower_split.wire.placed_payloads import in_memory
from flower_split.wire.sending import Outgoing
from flower_split.wire.shared_memory import SharedMemory, host_identity
from flower_split.wire.shared_slots import aligned

logger = logging.getLogger(__name__)

PAYLOAD_BYTES = 1 << 30  # of each direction of one client; pages take memory when they are used
DEVICE_BYTES = 1 << 28  # at most, of each direction of one client, on the GPU; taken at once


class SharedPayloads:
    """The pieces of memory by token. Thread-safe: a lock of its own, taken last.

    Args:
        knows_token: Whether a participant still has this token. Needs no lock.
        device: On which the trunk computes.
    """

    def __init__(self, knows_token: Callable[[str], bool], device: torch.device) -> None:
        self._knows_token = knows_token
        self._device = device
        self._lock = threading.Lock()
        self._pieces: dict[str, SharedMemory] = {}

    def offer(self, request: pb.ShareMemoryRequest, token: str) -> pb.ShareMemoryReply:
        """Return what a client opens the memory with; a process of 0 says that there is none.

        Safe to retry: the same token gets the same memory.

        Args:
            request: Says on which host, and as which user, the client runs.
            token: The call's token.
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
                self._share_device(piece, request)
        device = piece.device
        return pb.ShareMemoryReply(
            process=os.getpid(),
            descriptor=piece.descriptor,
            num_bytes=piece.num_bytes,
            nonce=piece.nonce,
            device_handle=b"" if device is None else device.handle,
            device_bytes=0 if device is None else device.num_bytes,
            device="" if device is None else device_name(device.device),
        )

    def _share_device(self, piece: SharedMemory, request: pb.ShareMemoryRequest) -> None:
        """Share memory of the GPU as well, where the client sees the trunk's."""
        own = device_name(self._device)
        if not own or own not in request.devices:
            return
        half = aligned(min(request.device_bytes, DEVICE_BYTES))
        try:
            piece.share_device(DeviceBuffer.make(2 * half, self._device), self._device)
        except OSError as error:
            logger.warning("no memory of the GPU can be shared with a client: %s", error)

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

    def close(self) -> None:
        """Give all memory up; tensors over it keep theirs as long as they live."""
        with self._lock:
            pieces = list(self._pieces.values())
            self._pieces.clear()
        for piece in pieces:
            piece.close_file()

    def count(self) -> int:
        """Return how many pieces there are."""
        with self._lock:
            return len(self._pieces)


def placed_frames(memory: SharedMemory, reply: Outgoing) -> Iterator[bytes]:
    """Return the frames of a reply whose payloads go into shared memory, if there is room."""
    reply, places = in_memory(memory, reply)
    places.answered()  # free once the client has opened it and let go of it
    return reply.frames()
