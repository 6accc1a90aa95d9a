"""The coordinator's methods of the trunk's service: rounds, status, the adapter."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import grpc
from google.protobuf.message import Message

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import (
    arrivals_from_proto,
    plan_from_proto,
)
from flower_split.protocol.reports import report_to_proto, status_to_proto
from flower_split.trunk.compute.checks import printable
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.service.admission import CoordinatorToken
from flower_split.trunk.service.client_certificates import CertificateGate
from flower_split.trunk.service.control import ControlCalls, Request
from flower_split.trunk.service.handlers import (
    Answering,
    Context,
    FirstFrames,
    deadline_of,
    token_of,
)
from flower_split.trunk.service.refusals import RefusalLog
from flower_split.wire.sending import Outgoing


class CoordinatorCalls:
    """What the ServerApp asks of one engine.

    Args:
        engine: What keeps the rounds.
        token: By which the coordinator is known.
        refusals: Notes refused calls.
        first_frames: Reads every request.
        gate: Knows clients by their certificates; None: they show none.
    """

    def __init__(
        self,
        engine: TrunkEngine,
        token: CoordinatorToken,
        refusals: RefusalLog,
        first_frames: FirstFrames,
        gate: CertificateGate | None = None,
    ) -> None:
        self._gate = gate
        self._refusals = refusals
        self._engine = engine
        self._token = token
        self._control = ControlCalls(refusals, first_frames)

    def handlers(self) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        """Return every method by its name."""
        return {
            "BeginRound": self._own(pb.BeginRoundRequest, self._begin_round),
            "PrepareRound": self._own(pb.PrepareRoundRequest, self._prepare_round),
            "CommitRound": self._own(pb.CommitRoundRequest, self._commit_round),
            "AbortRound": self._own(pb.AbortRoundRequest, self._abort_round),
            "RevokeClient": self._own(pb.RevokeClientRequest, self._revoke_client),
            "Status": self._own(pb.StatusRequest, self._status),
            "GetAdapter": grpc.stream_stream_rpc_method_handler(self._get_adapter),
        }

    def _own(
        self, request_type: type[Request], behaviour: Callable[[Request, Context], Message]
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """Return the handler of a call that is the coordinator's alone."""
        return self._control.handler(request_type, behaviour, self._require_coordinator)

    def _begin_round(self, request: pb.BeginRoundRequest, context: Context) -> Message:
        epoch, version = self._engine.begin_round(plan_from_proto(request))
        return pb.BeginRoundReply(trunk_epoch=epoch, version=version)

    def _prepare_round(self, request: pb.PrepareRoundRequest, context: Context) -> Message:
        report = self._engine.prepare_round(
            request.experiment,
            request.server_round,
            request.attempt,
            deadline_of(context),
            arrivals_from_proto(request),
        )
        return report_to_proto(report)

    def _commit_round(self, request: pb.CommitRoundRequest, context: Context) -> Message:
        version = self._engine.commit_round(
            request.experiment, request.server_round, request.attempt
        )
        return pb.CommitRoundReply(version=version)

    def _abort_round(self, request: pb.AbortRoundRequest, context: Context) -> Message:
        version = self._engine.abort_round(
            request.experiment, request.server_round, request.attempt, request.why
        )
        return pb.AbortRoundReply(version=version)

    def _revoke_client(self, request: pb.RevokeClientRequest, context: Context) -> Message:
        tokens = self._tokens_of(request.subject) if request.subject else []
        if not tokens and not request.slots:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST, "a client is revoked by its slot or its subject."
            )
        return pb.RevokeClientReply(slots=self._engine.revoke(list(request.slots), tokens))

    def _tokens_of(self, subject: str) -> list[str]:
        """Return the tokens of the clients whose certificates have a name.

        Raises:
            TrunkRefused: There are none, or the trunk asks for no certificates.
        """
        if self._gate is None:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                "the trunk asks for no client certificates (--client-ca), so it knows nobody by a "
                "subject. Name the client's slot: flower-split trunk-revoke … --slot N.",
            )
        tokens = self._gate.tokens_of(subject)
        if not tokens:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"no client of the round that was begun last has called with a certificate of "
                f"{printable(subject)}. Name its slot (--slot N), or take the subject off "
                "--allow-client, which holds from the next call on.",
            )
        return tokens

    def _status(self, request: pb.StatusRequest, context: Context) -> Message:
        if request.keep_alive:
            self._engine.keep_alive()
        return status_to_proto(self._engine.status())

    def _get_adapter(self, requests: Iterator[bytes], context: Context) -> Iterator[bytes]:
        with (
            Answering(context, "GetAdapter", self._refusals),
            self._require_coordinator(context),
        ):
            return Outgoing(pb.Header(reply=pb.ReplyHeader()), self._engine.adapter()).frames()

    def _require_coordinator(self, context: Context) -> AbstractContextManager[object]:
        if not self._token.accepts(token_of(context)):
            raise TrunkRefused(
                RefusalReason.UNAUTHENTICATED,
                "this call needs the coordinator's token. Give the ServerApp the trunk's token file "
                "(trunk.token-file).",
            )
        return nullcontext()
