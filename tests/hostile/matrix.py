"""The authorisation matrix: every call of the trunk's protocol with every wrong credential.

``python -m tests.hostile.matrix`` prints the table: the status code of each, and that nothing changed.
The trunk is a real one on loopback, over mutual TLS, with an engine, an audit log and a token file.
"""

import contextlib
import datetime
import hashlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import plan_to_proto
from flower_split.protocol.values import RoundPlan
from flower_split.runtime.secret_files import TokenFile
from flower_split.trunk.service.audit_log import AuditLog
from flower_split.trunk.service.client_certificates import MutualTls
from flower_split.trunk.service.server import TrunkServer
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.grpc_options import SERVICE, bearer, channel_options
from flower_split.wire.sending import Outgoing
from tests.support.certificates import DAY, Authority, renew
from tests.support.loopback import (
    FINGERPRINT,
    HIDDEN,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
)

METHODS = tuple(method.name for method in pb.DESCRIPTOR.services_by_name["Trunk"].methods)
OF_CLIENTS = (
    "OpenSession",
    "Forward",
    "Backward",
    "FinishStep",
    "WaitVersion",
    "ShortenPlan",
    "CloseSession",
    "ShareMemory",
)
HANDSHAKE = ("no certificate", "wrong CA", "expired", "not yet valid", "wrong host")
CREDENTIALS = (
    *HANDSHAKE,
    "revoked",
    "wrong round",
    "wrong slot",
    "wrong role",
    "stolen token",
    "replayed after commit",
)
SHORT = {
    "UNAVAILABLE": "no connection",
    "UNAUTHENTICATED": "unauthenticated",
    "FAILED_PRECONDITION": "precondition",
    "INVALID_ARGUMENT": "invalid",
    "OK": "ok, same state",
    "": "names none",
}
OLD, NEW = "the coordinator's former token", "the coordinator's token of now"
EXPERIMENT = "e"

# Of calls that name no session and no round of their own: nothing to be wrong about.
_NAMES_NO_ROUND = ("Status", "GetAdapter", "EndExperiment")
_NAMES_NO_SLOT = (
    "OpenSession",
    "ShareMemory",
    "BeginRound",
    "PrepareRound",
    "CommitRound",
    "AbortRound",
    *_NAMES_NO_ROUND,
)
_SAFE_TO_REPEAT = (
    "CloseSession",
    "ShareMemory",
    "BeginRound",
    "PrepareRound",
    "CommitRound",
    "AbortRound",
    "RevokeClient",
    *_NAMES_NO_ROUND,
)


def expected(method: str, credential: str) -> str:
    """The status code that a call must get; empty: the call cannot be made wrong in this way."""
    if credential in HANDSHAKE:
        return "UNAVAILABLE"
    if credential == "wrong round":
        if method in _NAMES_NO_ROUND:
            return ""
        if method in ("BeginRound", "RevokeClient"):
            return "INVALID_ARGUMENT"
        named = ("Forward", "Backward", "FinishStep", "PrepareRound", "CommitRound", "AbortRound")
        return "FAILED_PRECONDITION" if method in named else "UNAUTHENTICATED"
    if credential == "wrong slot":
        if method in _NAMES_NO_SLOT:
            return ""
        return "INVALID_ARGUMENT" if method == "RevokeClient" else "UNAUTHENTICATED"
    if credential == "wrong role" and method == "ShareMemory":
        return "OK"  # memory of the coordinator's own, which nobody else sees
    if credential == "replayed after commit":
        return "OK" if method in _SAFE_TO_REPEAT else "FAILED_PRECONDITION"
    return "UNAUTHENTICATED"


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a call names."""

    session: str
    epoch: int
    server_round: int
    attempt: int
    slot: int
    experiment: str = EXPERIMENT


def frames_of(method: str, names: Names, begun: RoundPlan) -> list[bytes]:
    """The messages of a call that would do something, if it were let in."""
    key = pb.ContributionKey(
        experiment=names.experiment, server_round=names.server_round, attempt=names.attempt
    )
    member = {"session": names.session, "trunk_epoch": names.epoch}
    of_round = {
        "experiment": names.experiment,
        "server_round": names.server_round,
        "attempt": names.attempt,
    }
    ones = torch.ones(1, 2, HIDDEN)
    if method == "Forward":
        forward = pb.ForwardHeader(**member, key=key, mode="TRAIN")
        return list(Outgoing(pb.Header(forward=forward), {"hidden_states": ones}).frames())
    if method == "Backward":
        backward = pb.BackwardHeader(
            **member, key=key, num_tokens=2.0, loss_denominator=2.0, last=True
        )
        return list(Outgoing(pb.Header(backward=backward), {"trunk_output_grad": ones}).frames())
    if method == "FinishStep":
        ended = pb.FinishStepHeader(**member, key=key, grad_norm_squared=1.0)
        return list(Outgoing(pb.Header(finish_step=ended), {}).frames())
    messages = {
        "OpenSession": lambda: pb.OpenSessionRequest(fingerprint=FINGERPRINT, planned_steps=1),
        "WaitVersion": lambda: pb.WaitVersionRequest(**member),
        "ShortenPlan": lambda: pb.ShortenPlanRequest(**member, planned_steps=1),
        "CloseSession": lambda: pb.CloseSessionRequest(**member),
        "ShareMemory": lambda: pb.ShareMemoryRequest(boot_id="another host", user=1),
        "BeginRound": lambda: plan_to_proto(begun),
        "PrepareRound": lambda: pb.PrepareRoundRequest(**of_round),
        "CommitRound": lambda: pb.CommitRoundRequest(**of_round),
        "AbortRound": lambda: pb.AbortRoundRequest(**of_round, why="an attack"),
        "RevokeClient": lambda: pb.RevokeClientRequest(slots=[names.slot]),
        "Status": pb.StatusRequest,
        "GetAdapter": pb.GetAdapterRequest,
        "EndExperiment": pb.EndExperimentRequest,
    }
    return [messages[method]().SerializeToString()]


@dataclass(frozen=True)
class Outcome:
    """What came of a call."""

    code: str
    changed: bool  # the trunk's state
    noted: int  # refusals that the trunk counted


class Rig:
    """A trunk with a round in progress, and everybody's credentials. Ends with :meth:`close`.

    Slots 0 (alice), 1 (bob) and 2 (carol) take part in attempt 1; carol has been revoked. Attempt 0 was
    given up, and the coordinator's token was changed. After :meth:`commit` the round is committed.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = contextlib.ExitStack()
        self.ca, self.other = Authority.made(folder / "ca"), Authority.made(folder / "other")
        certificate, key = self.ca.sign()
        self.audit_path, token_file = folder / "audit.jsonl", folder / "token"
        token_file.write_text(f"{OLD}\n")
        token_file.chmod(0o600)
        self.engine = make_engine(TinyTrunk())
        self._stack.callback(self.engine.close)
        self.server = TrunkServer(
            self.engine,
            coordinator_token=TokenFile(token_file, "--token-file"),
            tls_certificate=certificate,
            tls_key=key,
            mutual=MutualTls(
                client_ca=self.ca.root,
                clients=("alice", "bob", "carol"),
                coordinators=("server-app",),
            ),
            audit=self._stack.enter_context(AuditLog(self.audit_path)),
        )
        self.port = self.server.start()
        self._stack.callback(self.server.stop, 0.0)
        self.shown = {
            name: self.ca.client(name) for name in ("alice", "bob", "carol", "server-app")
        }
        self._channels: dict[tuple[str, str], grpc.Channel] = {}
        self.first = plan(3, quorum=0.3)
        fresh = {slot: f"second-{slot}" for slot in range(3)}
        self.plan = plan(3, quorum=0.3, attempt=1, participants=fresh)
        token_file.write_text(f"{NEW}\n{OLD}\n")
        renew((str(token_file),))
        self._begin()
        token_file.write_text(f"{NEW}\n")
        renew((str(token_file),))

    def _begin(self) -> None:
        self.link = self._stack.enter_context(
            coordinator(
                self.port,
                NEW,
                root_certificates=self.ca.root,
                certificate=self.shown["server-app"],
            )
        )
        self.epoch, _ = self.link.begin_round(self.first)
        with self._client("alice", "token-0") as alice:
            self.former = alice.open(1).session
            self.link.begin_round(self.plan)
        self.clients = {
            name: self._stack.enter_context(self._client(name, f"second-{slot}"))
            for slot, name in enumerate(("alice", "bob", "carol"))
        }
        self.sessions = {name: one.open(1).session for name, one in self.clients.items()}
        self.link.revoke_client([2])

    def _client(self, name: str, token: str) -> RemoteTrunk:
        return remote(
            self.port, token=token, root_certificates=self.ca.root, certificate=self.shown[name]
        )

    def commit(self) -> None:
        """Have the round done by alice and bob, and committed."""
        hidden = torch.ones(1, 2, HIDDEN)
        for name in ("alice", "bob"):
            client = self.clients[name]
            with client.micro_batch(0, 0, num_tokens=2, loss_denominator=2.0, last=True):
                client(hidden).sum().backward()
        self.link.prepare_round(EXPERIMENT, 1, 1)
        self.link.commit_round(EXPERIMENT, 1, 1)

    def close(self) -> None:
        """End everything."""
        for channel in self._channels.values():
            channel.close()
        self._stack.close()

    def attempt(self, method: str, credential: str) -> Outcome:
        """Make one call of the matrix."""
        before, counted = self.state(), sum(self.server.refusals.counts.values())
        shown, host, token, names, begun = self._credential(method, credential)
        channel = self._channel(shown, host)
        call = channel.stream_stream(f"/{SERVICE}/{method}")(
            iter(frames_of(method, names, begun)), timeout=20, metadata=bearer(token)
        )
        with contextlib.suppress(grpc.RpcError):
            list(call)
        noted = sum(self.server.refusals.counts.values()) - counted
        return Outcome(call.code().name, self.state() != before, noted)

    def state(self) -> str:
        """A hash of all that a call could change: weights, round, slots, what is kept for them."""
        status, kept = self.engine.status(), self.engine.inspect()
        text = repr(
            (
                status.epoch,
                status.version,
                status.experiment,
                status.server_round,
                status.attempt,
                status.phase,
                status.window,
                status.problem,
                [
                    (s.slot, s.completed, s.problem, s.contributions, s.num_tokens, s.joined)
                    for s in status.slots
                ],
                kept.num_replies,
                [self.engine.knows_token(f"second-{slot}") for slot in range(3)],
            )
        )
        digest = hashlib.sha256(text.encode())
        for name, tensor in sorted(self.engine.adapter().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def _credential(
        self, method: str, credential: str
    ) -> tuple[ClientCertificate, str, str, Names, RoundPlan]:
        """Certificate, host, token and names of a call, and the round that a BeginRound asks for."""
        client = method in OF_CLIENTS
        owner = "alice" if client else "server-app"
        shown, host, begun = self.shown[owner], "127.0.0.1", self.plan
        token = "second-0" if client else NEW
        session, slot, server_round = self.sessions["alice"], 1, 1
        if credential == "no certificate":
            shown = NO_CERTIFICATE
        elif credential == "wrong CA":
            shown = self.other.client(owner)
        elif credential == "expired":
            shown = self.ca.client(f"{owner}-late", -2 * DAY, -DAY)
        elif credential == "not yet valid":
            shown = self.ca.client(f"{owner}-early", DAY, 2 * DAY)
        elif credential == "wrong host":
            host = "trunk.example"
        elif credential == "revoked" and client:
            shown, token, session = self.shown["carol"], "second-2", self.sessions["carol"]
        elif credential == "revoked":
            token = OLD
        elif credential == "wrong round":
            server_round, session, slot = 7, self.sessions["alice"], 7
            begun = plan(1, experiment="another")
            if method in ("WaitVersion", "ShortenPlan", "CloseSession"):
                session = self.former
            elif method in ("OpenSession", "ShareMemory"):
                token = "token-0"
        elif credential == "wrong slot":
            session, slot = self.sessions["bob"], 7
        elif credential == "wrong role":
            token = NEW if client else "second-0"
            shown = self.shown["server-app" if client else "alice"]
        elif credential == "stolen token":
            shown = self.shown["bob"]
        elif credential == "replayed after commit":
            slot = 2
        names = Names(
            session=session, epoch=self.epoch, server_round=server_round, attempt=1, slot=slot
        )
        return shown, host, token, names, begun

    def _channel(self, shown: ClientCertificate, host: str) -> grpc.Channel:
        """A connection, kept; made here, for the package itself shows no certificate that is expired."""
        key = (shown.certificate, host)
        if key not in self._channels:
            files = [
                Path(name).read_bytes() if name else None for name in (shown.key, shown.certificate)
            ]
            root = Path(self.ca.root).read_bytes()
            options = [*channel_options(), ("grpc.ssl_target_name_override", host)]
            self._channels[key] = grpc.secure_channel(
                f"127.0.0.1:{self.port}",
                grpc.ssl_channel_credentials(root, *files),
                options=options,
            )
        return self._channels[key]


@contextlib.contextmanager
def rigs(folder: Path) -> Iterator[dict[bool, Rig]]:
    """One trunk with a round in progress, and one whose round is committed."""
    with contextlib.ExitStack() as stack:
        made = {}
        for committed in (False, True):
            own = folder / ("committed" if committed else "open")
            own.mkdir()
            made[committed] = stack.enter_context(contextlib.closing(Rig(own)))
        made[True].commit()
        yield made


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines with columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main() -> int:
    """Print the matrix; exit with 1 where a cell is not as it must be."""
    wrong, started = [], datetime.datetime.now(datetime.UTC)
    rows = [["", *CREDENTIALS]]
    with tempfile.TemporaryDirectory() as folder, rigs(Path(folder)) as made:
        for method in METHODS:
            row = [method]
            for credential in CREDENTIALS:
                must = expected(method, credential)
                if must:
                    found = made[credential == "replayed after commit"].attempt(method, credential)
                    if found.code != must or found.changed:
                        wrong.append((method, credential, must, found))
                    row.append(SHORT.get(found.code, found.code) + (" CHANGED" * found.changed))
                else:
                    row.append(SHORT[""])
            rows.append(row)
    print(table(rows))
    seconds = (datetime.datetime.now(datetime.UTC) - started).total_seconds()
    print(
        f"{len(METHODS)} x {len(CREDENTIALS)} in {seconds:.1f} s; {len(wrong)} not as they must be"
    )
    for cell in wrong:
        print(*cell, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
