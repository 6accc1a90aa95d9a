"""Whoever has seen a client's token and its calls can use neither, on no connection."""

from collections.abc import Iterator, Mapping

import grpc
import pytest

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.trunk.service.audit_log import AuditLog, verify_audit_log
from flower_split.wire.grpc_options import PROOF, SERVICE, bearer
from flower_split.wire.possession import ClientKey, new_token
from tests.hostile.matrix import OF_CLIENTS, Names, frames_of
from tests.support.loopback import (
    FINGERPRINT,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    served,
)


class Wiretap(grpc.ServerInterceptor):
    """Keeps the credentials of every call, as somebody on the way would see them."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Mapping[str, str | bytes]]] = []

    def intercept_service(self, continuation, details):  # type: ignore[no-untyped-def]
        metadata = {key: value for key, value in details.invocation_metadata or ()}
        self.seen.append((details.method.rpartition("/")[2], metadata))
        return continuation(details)


KEY = ClientKey()
"""Of the honest client."""


class Scene:
    """A trunk, one honest client with a session, and who listens."""

    def __init__(self, port: int, tap: Wiretap, token: str, honest: RemoteTrunk) -> None:
        self.port, self.tap, self.token, self.honest = port, tap, token, honest

    def attempt(self, method: str, metadata: object) -> str:
        """The status of a call that names the honest client's session."""
        grant = self.honest.grant
        assert grant is not None
        names = Names(session=grant.session, epoch=grant.epoch, server_round=1, attempt=0, slot=0)
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            call = channel.stream_stream(f"/{SERVICE}/{method}")(
                iter(frames_of(method, names, plan())), timeout=10, metadata=metadata
            )
            try:
                list(call)
            except grpc.RpcError:
                pass
            return str(call.code().name)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    token, tap = new_token(KEY.public), Wiretap()
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    engine = make_engine(TinyTrunk())
    with (
        served(engine, interceptors=[tap], audit=AuditLog(path)) as port,
        coordinator(port) as control,
    ):
        control.begin_round(plan(participants={0: token}))
        address = f"127.0.0.1:{port}"
        with RemoteTrunk(
            address,
            token=token,
            key=KEY,
            fingerprint=FINGERPRINT,
            mode="joint",
            call_timeout=10.0,
        ) as honest:
            honest.open(1)
            yield Scene(port, tap, token, honest)
            honest.wait_version(0)  # the session has gone through all of it
    verify_audit_log([path])


@pytest.mark.parametrize("method", OF_CLIENTS)
def test_stolen_token_is_worth_nothing(scene: Scene, method: str) -> None:
    thief = ClientKey()
    full = f"/{SERVICE}/{method}"
    for proof in (None, b"", bytes(72), thief.proof(scene.token, full)):
        shown = () if proof is None else ((PROOF, proof),)
        assert scene.attempt(method, (*bearer(scene.token), *shown)) == "UNAUTHENTICATED"


@pytest.mark.parametrize("method", OF_CLIENTS)
def test_recorded_call_cannot_be_made_again(scene: Scene, method: str) -> None:
    """Neither as it was, nor as another call."""
    scene.honest.wait_version(0)
    recorded = [meta for name, meta in scene.tap.seen if name in ("OpenSession", "WaitVersion")]
    own = [meta for meta in recorded if meta.get("authorization") == f"Bearer {scene.token}"]
    good = [meta for meta in own if len(meta.get(PROOF, b"")) == 72]
    assert len(good) >= 2
    for metadata in good:
        stolen = (("authorization", metadata["authorization"]), (PROOF, metadata[PROOF]))
        assert scene.attempt(method, stolen) == "UNAUTHENTICATED"


def test_answer_is_that_of_a_token_that_nobody_has(scene: Scene) -> None:
    texts = []
    for token in (scene.token, "a token that nobody has"):
        with grpc.insecure_channel(f"127.0.0.1:{scene.port}") as channel:
            call = channel.stream_stream(f"/{SERVICE}/CloseSession")(
                iter([b""]), timeout=10, metadata=bearer(token)
            )
            with pytest.raises(grpc.RpcError):
                list(call)
            texts.append((call.code(), call.details(), tuple(call.trailing_metadata() or ())))
    assert texts[0] == texts[1]
