"""The attacker's tools: calls of any content with any credential, streams that stay silent, raw bytes."""

import queue
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

import grpc
import torch
from torch import Tensor

from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.grpc_options import SERVICE, Metadata, bearer
from flower_split.wire.sending import Outgoing

ROWS, POSITIONS, HIDDEN = 4, 64, 256
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADERS, _DATA, _SETTINGS = 1, 0, 4
_END_STREAM, _END_HEADERS = 1, 4


class Held:
    """A stream of requests that sends some frames and then nothing, until it is let go."""

    def __init__(self, frames: Sequence[bytes] = ()) -> None:
        self._frames = list(frames)
        self._end: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._frames:
            return self._frames.pop(0)
        self._end.get()
        raise StopIteration

    def end(self) -> None:
        self._end.put(None)


class Enemy:
    """A participant of the round that means no good.

    Args:
        port: The trunk's.
        token: Its own.
        stale: Its token of the round before.
        experiment: Of the round.
        victim: The honest client's session, which it has seen.
        fingerprint: That the trunk wants.

    Attributes:
        answers: How its calls were answered.
        texts: What an answer of each status said.
        session: Its own; empty before :meth:`join`.
        epoch: The trunk's.
        version: Of the weights.
        count: A number that is another one every time.
    """

    def __init__(
        self,
        port: int,
        token: str,
        stale: str,
        experiment: str,
        victim: str,
        fingerprint: Mapping[str, str],
    ) -> None:
        self.port, self.token, self.stale = port, token, stale
        self.experiment, self.victim, self.fingerprint = experiment, victim, dict(fingerprint)
        self.session, self.epoch, self.version = "", 0, 0
        self.answers: Counter[str] = Counter()
        self.texts: dict[str, str] = {}
        self._numbers = 0
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.max_send_message_length", -1),
        ]
        self._channels = [
            grpc.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(3)
        ]
        self._held: list[tuple[Held, grpc.Call]] = []
        self._sockets: list[socket.socket] = []

    @property
    def count(self) -> int:
        self._numbers += 1
        return self._numbers

    # ---- calls

    def join(self, **changes: object) -> str:
        """Open its session; return the status."""
        values = {"fingerprint": self.fingerprint, "planned_steps": 1, "evaluate": False}
        request = pb.OpenSessionRequest(**{**values, **changes})
        call = self._channels[0].unary_unary(f"/{SERVICE}/OpenSession")
        try:
            data = call(request.SerializeToString(), timeout=20, metadata=bearer(self.token))
        except grpc.RpcError as error:
            return str(error.code().name)
        grant = pb.OpenSessionReply.FromString(data)
        self.session, self.epoch, self.version = grant.session, grant.trunk_epoch, grant.version
        return "OK"

    def call(
        self,
        method: str,
        frames: Iterable[bytes] = (),
        metadata: Metadata | None = None,
        timeout: float = 20.0,
    ) -> str:
        """Make a call and wait for its answer, which is counted; return the status."""
        metadata = bearer(self.token) if metadata is None else metadata
        path = method if method.startswith("/") else f"/{SERVICE}/{method}"
        code = "OK"
        try:
            for _ in self._channels[0].stream_stream(path)(
                iter(frames), timeout=timeout, metadata=metadata
            ):
                pass
        except grpc.RpcError as error:
            code = str(error.code().name)
            self.texts[code] = str(error.details())
        self.answers[code] += 1
        return code

    def start(
        self,
        method: str,
        count: int,
        frames: Sequence[bytes] = (),
        metadata: Metadata | None = None,
        *,
        silent: bool = True,
        timeout: float = 86_000.0,
    ) -> None:
        """Make calls whose answers are not waited for before :meth:`let_go`.

        Args:
            method: Of the trunk's, or a path.
            count: How many.
            frames: That each sends.
            metadata: None: its own token.
            silent: Whether each stays open after its frames.
            timeout: Seconds; a day where its caller likes it so.
        """
        metadata = bearer(self.token) if metadata is None else metadata
        path = method if method.startswith("/") else f"/{SERVICE}/{method}"
        for index in range(count):
            held = Held(frames)
            if not silent:
                held.end()
            channel = self._channels[index % len(self._channels)]
            call = channel.stream_stream(path)(held, timeout=timeout, metadata=metadata)
            self._held.append((held, call))

    def let_go(self, patience: float = 0.0) -> None:
        """Count how held calls were answered, and end those that were not.

        Args:
            patience: Seconds to wait, for all of them together, until each is answered.
        """
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not all(call.done() for _, call in self._held):
            time.sleep(0.01)
        for held, call in self._held:
            code = str(call.code().name) if call.done() else "OPEN"
            self.answers[code] += 1
            if call.done():
                self.texts[code] = str(call.details())
            call.cancel()
            held.end()
        self._held.clear()

    def close(self, patience: float = 0.0) -> None:
        """Leave the trunk alone, after so many seconds of waiting for answers."""
        self.let_go(patience)
        for channel in self._channels:
            channel.close()
        self.disconnect()

    # ---- messages

    def key(self, micro_batch: int, **changes: object) -> pb.ContributionKey:
        values = {"experiment": self.experiment, "server_round": 1, "attempt": 0, "window": 0}
        return pb.ContributionKey(**{**values, "micro_batch": micro_batch, **changes})

    def forward(
        self,
        micro_batch: int,
        tensors: Mapping[str, Tensor] | None = None,
        key: Mapping[str, object] | None = None,
        **changes: object,
    ) -> list[bytes]:
        """The frames of a forward: in training, of the honest client's size, unless said."""
        header = pb.ForwardHeader(
            session=self.session, trunk_epoch=self.epoch, version=self.version, mode=pb.TRAIN
        )
        header.key.CopyFrom(self.key(micro_batch, **(key or {})))
        header.MergeFrom(pb.ForwardHeader(**changes))
        found = {"hidden_states": smashed()} if tensors is None else tensors
        return list(Outgoing(pb.Header(forward=header), found).frames())

    def backward(
        self,
        micro_batch: int,
        grad: Tensor | None = None,
        key: Mapping[str, object] | None = None,
        **changes: object,
    ) -> list[bytes]:
        """The frames of a backward: honest and not the last one, unless said."""
        values = {"session": self.session, "trunk_epoch": self.epoch, "version": self.version}
        numbers = {"num_tokens": 256.0, "loss_denominator": 256.0, "last": False}
        header = pb.BackwardHeader(**{**values, **numbers, **changes})
        header.key.CopyFrom(self.key(micro_batch, **(key or {})))
        found = {"trunk_output_grad": smashed() if grad is None else grad}
        return list(Outgoing(pb.Header(backward=header), found).frames())

    # ---- below gRPC

    def connect(self, count: int, data: bytes = b"") -> None:
        """Open connections that send ``data`` and then nothing."""
        for _ in range(count):
            one = socket.create_connection(("127.0.0.1", self.port), timeout=10)
            with suppress(ConnectionError):  # it is closed at once, beyond so many
                one.sendall(data)
            self._sockets.append(one)
            self.answers["CONNECTED"] += 1

    def disconnect(self) -> None:
        """Close the connections of :meth:`connect`."""
        for one in self._sockets:
            one.close()
        self._sockets.clear()

    def stall_inside_messages(self, count: int, token: str) -> None:
        """HTTP/2 streams that announce a message of 8 MiB, send a part of it, and stop."""
        part = struct.pack(">BI", 0, 8 << 20) + bytes(900)
        self._sockets.append(http2_forwards(self.port, token, [part] * count, end=False))
        self.answers["STALLED"] += count


def smashed(rows: int = ROWS, positions: int = POSITIONS, width: int = HIDDEN) -> Tensor:
    """Hidden states, or a gradient, of ones."""
    return torch.ones(rows, positions, width)


def http2_forwards(
    port: int, token: str, contents: Sequence[bytes], *, end: bool = True
) -> socket.socket:
    """Forwards on one connection whose window for replies stays at the 64 KiB it begins with.

    Args:
        port: The trunk's.
        token: Of the caller.
        contents: What each sends, as gRPC frames its messages.
        end: Whether each ends its request.
    """
    one = socket.create_connection(("127.0.0.1", port), timeout=10)
    one.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, b""))
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/{SERVICE}/Forward",
        ":authority": "trunk",
        "te": "trailers",
        "content-type": "application/grpc",
        "grpc-timeout": "20000S",
        "authorization": f"Bearer {token}",
    }
    block = b"".join(_literal(name, value) for name, value in headers.items())
    for index, content in enumerate(contents):
        stream = 2 * index + 1
        one.sendall(_frame(_HEADERS, _END_HEADERS, stream, block))
        parts = [content[at : at + 16_000] for at in range(0, len(content), 16_000)]
        for part in parts:
            last = part is parts[-1]
            one.sendall(_frame(_DATA, _END_STREAM if last and end else 0, stream, part))
        one.recv(1 << 16)  # what it answers, which lets the next request in
    return one


def _literal(name: str, value: str) -> bytes:
    """A header field of HPACK without indexing and without Huffman's code."""
    text = value.encode(errors="surrogateescape")  # bytes that are no UTF-8 come as they are
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(text)]) + text


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes([kind, flags])
        + struct.pack(">I", stream)
        + payload
    )
