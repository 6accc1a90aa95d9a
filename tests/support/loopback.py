"""What the tests of the remote trunk share: a tiny trunk, engines true and fake, a recorder."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager

import grpc
import torch
from torch import Tensor, nn

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import OptimizerConfig
from flower_split.protocol.values import (
    BackwardCall,
    CallResult,
    ForwardCall,
    RoundPlan,
    SessionGrant,
    TrunkStatus,
)
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.split import CutLayers
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.shares import Shares
from flower_split.trunk.service.server import TrunkServer

HIDDEN = 6
COORDINATOR_TOKEN = "coordinator-token"
FINGERPRINT = {"model": "tiny", "protocol": "1"}


class TinyTrunk(nn.Module):
    """Two linear layers; masked positions pass through, positions are added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one = nn.Linear(HIDDEN, HIDDEN)
        self.two = nn.Linear(HIDDEN, HIDDEN)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        out = hidden_states
        if position_ids is not None:
            out = out + 0.1 * position_ids.unsqueeze(-1)
        out = self.two(torch.tanh(self.one(out)))
        if attention_mask is not None:
            out = torch.where(attention_mask.unsqueeze(-1) == 1, out, hidden_states)
        return out


def make_engine(
    trunk: nn.Module,
    *,
    mode: str = "joint",
    hidden_size: int = HIDDEN,
    shares: Shares | None = None,
) -> TrunkEngine:
    """The real engine around a module, with SGD at 0.1 and no clipping."""
    optimizer = OptimizerConfig(name="sgd", learning_rate=0.1, max_grad_norm=0.0)
    return TrunkEngine(
        TrunkCompute(trunk, optimizer, seed=0),
        mode=mode,
        hidden_size=hidden_size,
        fingerprint=FINGERPRINT,
        activation_bytes=1 << 26,
        shares=shares,
    )


def plan(slots: int = 1, **changes: object) -> RoundPlan:
    """Round 1 for ``slots`` participants, whose tokens are token-0, token-1, ..."""
    values: dict[str, object] = {
        "experiment": "e",
        "server_round": 1,
        "attempt": 0,
        "participants": {slot: f"token-{slot}" for slot in range(slots)},
        "join_seconds": 20.0,
        "window_seconds": 20.0,
    }
    return RoundPlan(**{**values, **changes})


def remote(port: int, *, slot: int = 0, mode: str = "joint", **changes: object) -> RemoteTrunk:
    """A client of ``slot``."""
    values: dict[str, object] = {
        "token": f"token-{slot}",
        "fingerprint": FINGERPRINT,
        "mode": mode,
        "call_timeout": 20.0,
    }
    return RemoteTrunk(f"127.0.0.1:{port}", **{**values, **changes})


def coordinator(
    port: int, token: str = COORDINATOR_TOKEN, timeout: float = 20.0, **tls: object
) -> closing[TrunkCoordinator]:
    return closing(TrunkCoordinator(f"127.0.0.1:{port}", token, timeout=timeout, **tls))


@contextmanager
def served(engine: object, **options: object) -> Iterator[int]:
    """The port of a server around ``engine``; both end with the block."""
    server = TrunkServer(engine, coordinator_token=COORDINATOR_TOKEN, **options)
    port = server.start()
    try:
        yield port
    finally:
        server.stop(0.0)
        engine.close()


class FakeEngine:
    """Doubles what it gets. ``on_call(method, number)`` runs first, and may raise or wait."""

    def __init__(self, on_call: Callable[[str, int], None] | None = None) -> None:
        self.epoch = 7
        self.hidden_size = HIDDEN
        self.device = torch.device("cpu")
        self.window_batches = False
        self.fingerprint = FINGERPRINT
        self.queue_seconds = 0.0
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self.bytes: list[tuple[str, int, int]] = []
        self.ended = threading.Event()  # set by close(): whoever waits may go
        self._on_call = on_call or (lambda method, number: None)
        self._lock = threading.Lock()

    def _note(self, method: str, *arguments: object) -> None:
        with self._lock:
            self.calls.append((method, arguments))
            number = sum(name == method for name, _ in self.calls)
        self._on_call(method, number)

    def knows_token(self, token: str) -> bool:
        return token != COORDINATOR_TOKEN  # everybody else takes part

    def count(self, method: str) -> int:
        return sum(name == method for name, _ in self.calls)

    def open_session(
        self,
        token: str,
        fingerprint: Mapping[str, str],
        planned_steps: int,
        evaluate: bool,
        cuts: CutLayers | None = None,
    ) -> SessionGrant:
        self._note("open_session", token, dict(fingerprint), planned_steps, evaluate, cuts)
        return SessionGrant(
            session=f"session-of-{token}",
            epoch=self.epoch,
            version=10,
            experiment="e",
            server_round=1,
            attempt=0,
            lease_seconds=5.0,
            slot=0,
        )

    def forward(self, call: ForwardCall) -> CallResult:
        self._note("forward", call)
        return CallResult(2 * call.tensors["hidden_states"], 10, 0.25, 0.5)

    def backward(self, call: BackwardCall) -> CallResult:
        self._note("backward", call)
        return CallResult(2 * call.grad, 10, 0.25, 0.5)

    def wait_version(self, session: str, epoch: int, version: int, deadline: float) -> int:
        self._note("wait_version", session, epoch, version, deadline)
        return version

    def close_session(self, session: str, epoch: int) -> None:
        self._note("close_session", session, epoch)

    def status(self) -> TrunkStatus:
        self._note("status")
        return TrunkStatus(epoch=self.epoch, version=10)

    def count_bytes(self, session: str, received: int, sent: int) -> None:
        self.bytes.append((session, received, sent))

    def wait(self, deadline: float) -> bool:
        """Block as an engine does until ``deadline`` or its end; whether it has ended."""
        return self.ended.wait(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        self.ended.set()


class Recorder(grpc.ServerInterceptor):
    """Keeps every byte that every request brings: ``(method, frame or message)``."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, bytes]] = []

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = continuation(details)
        if handler is None or not details.method.startswith("/flower_split.Trunk/"):
            return handler
        method = details.method.rpartition("/")[2]

        def noted(requests: Iterator[bytes]) -> Iterator[bytes]:
            for request in requests:
                self.requests.append((method, request))
                yield request

        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                lambda requests, context: handler.stream_stream(noted(requests), context)
            )

        def one(behaviour: Callable[..., object]) -> Callable[..., object]:
            def run(request: bytes, context: grpc.ServicerContext) -> object:
                self.requests.append((method, request))
                return behaviour(request, context)

            return run

        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(one(handler.unary_stream))
        return grpc.unary_unary_rpc_method_handler(one(handler.unary_unary))
