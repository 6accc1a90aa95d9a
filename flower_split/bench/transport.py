"""Round-trip time of a tensor through the trunk's server, against raw TCP and against memcpy.

Beside them stand the codecs: a tensor of the same bytes, cast and encoded, and decoded again.

The trunk is an echo in another process, so what is timed is the wire: framing or shared memory, gRPC,
checks, the digest of a training call. ``memcpy`` copies the same bytes there and back within this
process, into memory that has been used before. All run in turns, because loopback varies by a third
between runs.

Over a :class:`~flower_split.bench.shaped_link.Link` raw TCP and gRPC each pass through it, and neither
shared memory nor codecs are timed: they do not depend on a link.
"""

import multiprocessing
import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor

from flower_split.bench.codec_rows import codec_rows
from flower_split.bench.figures import Figures, Row
from flower_split.bench.machine import describe_machine
from flower_split.bench.shaped_link import Link, serve_link
from flower_split.bench.turns import in_turns
from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import TrunkConfig
from flower_split.protocol.values import CallResult, ForwardCall, SessionGrant
from flower_split.split import CutLayers
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.service.limits import Limits
from flower_split.trunk.service.server import TrunkServer

SIZES = (0.39, 8.4, 67.0)  # MB: one short sequence, a small batch, 8 x 512 tokens of width 4096

_HIDDEN = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportBench:
    """What to time.

    Args:
        sizes: In MB.
        repeats: Of each kind that count.
        link: Between client and trunk; None: loopback as it is.
        stream_window: As ``trunk.stream-window`` says.

    Raises:
        ConfigError: A window that a trunk refuses.
    """

    sizes: Sequence[float] = SIZES
    repeats: int = 15
    link: Link | None = None
    stream_window: int = Limits().stream_window

    def __post_init__(self) -> None:
        TrunkConfig(stream_window=self.stream_window)  # refuses what a trunk does

    @property
    def patience(self) -> float:
        """Seconds to wait for one round trip: ten times what the link needs for it, and a minute."""
        return 60.0 + 10 * self.least_seconds(max(self.sizes))

    def least_seconds(self, size: float) -> float:
        """Seconds that the link takes for so many MB there and back; 0 where there is none."""
        return 0.0 if self.link is None else 2 * size * 1e6 / self.link.bytes_per_second


class _EchoEngine:
    """Answers a forward with its input."""

    epoch = 1
    device = torch.device("cpu")
    window_batches = False
    fingerprint: Mapping[str, str] = MappingProxyType({})  # no codec named: tensors as they are

    def open_session(
        self,
        token: str,
        fingerprint: Mapping[str, str],
        planned_steps: int,
        evaluate: bool,
        cuts: CutLayers | None = None,
    ) -> SessionGrant:
        """Take anyone."""
        return SessionGrant(
            session=f"of {token}",
            epoch=self.epoch,
            version=0,
            experiment="benchmark",
            server_round=1,
            attempt=0,
            lease_seconds=60.0,
            slot=0,
        )

    def forward(self, call: ForwardCall) -> CallResult:
        """Return the smashed data itself."""
        return CallResult(call.tensors["hidden_states"], 0, 0.0, 0.0)

    def knows_token(self, token: str) -> bool:
        """Let everybody in."""
        return True

    def close_session(self, session: str, epoch: int) -> None:
        """Keep nothing."""

    def count_bytes(self, session: str, received: int, sent: int) -> None:
        """Count nothing."""


def _serve_trunk(ready: Connection, stream_window: int) -> None:
    """Serve an echo trunk until the other end of the pipe closes."""
    torch.set_num_threads(1)
    limits = Limits(stream_window=stream_window)
    engine = cast(TrunkEngine, _EchoEngine())
    with TrunkServer(engine, coordinator_token="none", limits=limits) as server:
        ready.send(server.start())
        _until_closed(ready)


def _serve_tcp(ready: Connection) -> None:
    """Read 8 bytes of length and so many bytes, send them back; again until the client is gone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready.send(listener.getsockname()[1])
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            head, buffer = memoryview(bytearray(8)), bytearray()
            while _fill(connection, head):
                length = int.from_bytes(head, "little")
                if len(buffer) != length:
                    buffer = bytearray(length)
                _fill(connection, memoryview(buffer))
                connection.sendall(buffer)


def _until_closed(pipe: Connection) -> None:
    try:
        pipe.recv()
    except EOFError:
        pass


def _fill(connection: socket.socket, target: memoryview) -> bool:
    """Receive until ``target`` is full; False where the other side has closed."""
    filled = 0
    while filled < len(target):
        count = connection.recv_into(target[filled:])
        if not count:
            return False
        filled += count
    return True


def start_apart(serve: Callable[[Connection], None], stack: ExitStack) -> int:
    """Run ``serve`` in a fresh process until ``stack`` ends; return its port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    stack.callback(process.join, 5)
    stack.callback(ours.close)
    return int(ours.recv())


def measure_transport(bench: TransportBench) -> Figures:
    """Time round trips of every size, all kinds in turns."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    with ExitStack() as stack:
        tcp_port = start_apart(_serve_tcp, stack)
        trunk_port = start_apart(partial(_serve_trunk, stream_window=bench.stream_window), stack)
        transports = {"gRPC": "grpc", "shared memory": "shared-memory"}
        if bench.link is not None:
            del transports["shared memory"]
            tcp_port, trunk_port = (
                start_apart(partial(serve_link, link=bench.link, target=port), stack)
                for port in (tcp_port, trunk_port)
            )
        connection = stack.enter_context(
            socket.create_connection(("127.0.0.1", tcp_port), timeout=bench.patience)
        )
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trunks = {
            name: _client(trunk_port, kind, bench.patience) for name, kind in transports.items()
        }
        for trunk in trunks.values():
            stack.callback(trunk.close)
        for size in bench.sizes:
            smashed = torch.randn(1, max(1, round(size * 1e6 / 4 / _HIDDEN)), _HIDDEN)
            rows += _rows(size, smashed, connection, trunks, bench)
            if bench.link is None:
                rows += codec_rows(f"{size:g} MB: ", smashed, bench.repeats)
    over = "on loopback" if bench.link is None else f"over a link of {bench.link}"
    return Figures(
        name="transport",
        title=f"Round trips to a trunk's server {over}",
        machine=describe_machine(),
        settings=asdict(bench),
        rows=rows,
    )


def _client(port: int, transport: str, patience: float) -> RemoteTrunk:
    """Return an open session of its own with the echo trunk."""
    trunk = RemoteTrunk(
        f"127.0.0.1:{port}",
        token=f"benchmark-{transport}",
        fingerprint={},
        mode="joint",
        call_timeout=2 * patience,  # an attempt gets half of it
        transport=transport,
    )
    trunk.open(1)
    return trunk


def _rows(
    size: float,
    smashed: Tensor,
    connection: socket.socket,
    trunks: Mapping[str, RemoteTrunk],
    bench: TransportBench,
) -> list[Row]:
    """Time all ways in turns."""
    data = smashed.numpy().tobytes()
    back = memoryview(bytearray(len(data)))
    there = memoryview(bytearray(len(data)))

    def tcp() -> None:
        connection.sendall(len(data).to_bytes(8, "little"))
        connection.sendall(data)
        if not _fill(connection, back):
            raise ConnectionError("the TCP server of the benchmark has closed its connection.")

    def memcpy() -> None:
        there[:] = data
        back[:] = there

    def evaluate(trunk: RemoteTrunk) -> None:
        with torch.no_grad():
            trunk(smashed)

    def train(trunk: RemoteTrunk) -> None:
        with trunk.micro_batch(0, 0, num_tokens=1, loss_denominator=1.0, last=True):
            trunk(smashed)

    ways: dict[str, Callable[[], object]] = {"raw TCP": tcp}
    if bench.link is None:
        ways["memcpy"] = memcpy
    for name, trunk in trunks.items():
        ways[f"{name}, evaluation"] = partial(evaluate, trunk)
        ways[f"{name}, training call"] = partial(train, trunk)
    least = bench.least_seconds(size)
    return [
        _row(size, name, seconds, least) for name, seconds in in_turns(ways, bench.repeats).items()
    ]


def _row(size: float, name: str, seconds: tuple[float, ...], least: float = 0.0) -> Row:
    """Return a row; ``least`` are the seconds that a link takes for its bytes there and back."""
    base = "memcpy" if "memory" in name else "raw TCP"
    return Row(
        what=f"{size:g} MB: {name}",
        seconds=seconds,
        base=f"{size:g} MB: {base}",
        beside={"of the link": least / statistics.median(seconds)} if least else {},
    )
