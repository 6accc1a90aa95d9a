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
    settings_from_proto,
)
from flower_split.protocol.reports import report_to_proto, status_to_proto
from flower_split.protocol.values import RoundPlan
from flower_split.trunk.compute.checks import printable
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.experiments import Experiments
from flower_split.trunk.service.admission import CoordinatorTokens
from flower_split.trunk.service.client_certificates import CertificateGate
from flower_split.trunk.service.control import ControlCalls, Request, parsed
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
    """What ServerApps ask of the engines of their experiments.

    Args:
        experiments: The experiments whose engines keep the rounds.
        tokens: By which coordinators are known.
        refusals: Notes refused calls.
        first_frames: Reads every request.
        gate: Knows clients by their certificates; None: they show none.
    """

    def __init__(
        self,
        experiments: Experiments,
        tokens: CoordinatorTokens,
        refusals: RefusalLog,
        first_frames: FirstFrames,
        gate: CertificateGate | None = None,
    ) -> None:
        self._gate = gate
        self._refusals, self._first_frames = refusals, first_frames
        self._experiments = experiments
        self._tokens = tokens
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
            "EndExperiment": self._own(pb.EndExperimentRequest, self._end_experiment),
            "GetAdapter": grpc.stream_stream_rpc_method_handler(self._get_adapter),
        }

    def _own(
        self, request_type: type[Request], behaviour: Callable[[Request, Context], Message]
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """Return the handler of a call that is the coordinator's alone."""
        return self._control.handler(request_type, behaviour, self._require_coordinator)

    def _begin_round(self, request: pb.BeginRoundRequest, context: Context) -> Message:
        plan, values = plan_from_proto(request), settings_from_proto(request)
        owner = self._owner(context)
        self._check_tokens(plan, owner)
        engine = self._experiments.begin(owner, plan.experiment, values)
        epoch, version = engine.begin_round(plan)
        return pb.BeginRoundReply(trunk_epoch=epoch, version=version)

    def _check_tokens(self, plan: RoundPlan, owner: str) -> None:
        """Check that no token is a coordinator's or another experiment's: a call has one sender."""
        tokens = [*plan.participants.values(), *(item.token for item in plan.dispatches)]
        if any(self._tokens.owner_of(token) is not None for token in tokens):
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                "BeginRound: a participant has a coordinator's token. Draw one for it alone.",
            )
        self._experiments.check_tokens(owner, plan.experiment, tokens)

    def _prepare_round(self, request: pb.PrepareRoundRequest, context: Context) -> Message:
        report = self._of(request.experiment, context).prepare_round(
            request.experiment,
            request.server_round,
            request.attempt,
            deadline_of(context),
            arrivals_from_proto(request),
        )
        return report_to_proto(report)

    def _commit_round(self, request: pb.CommitRoundRequest, context: Context) -> Message:
        version = self._of(request.experiment, context).commit_round(
            request.experiment, request.server_round, request.attempt
        )
        return pb.CommitRoundReply(version=version)

    def _abort_round(self, request: pb.AbortRoundRequest, context: Context) -> Message:
        version = self._of(request.experiment, context).abort_round(
            request.experiment, request.server_round, request.attempt, request.why
        )
        return pb.AbortRoundReply(version=version)

    def _end_experiment(self, request: pb.EndExperimentRequest, context: Context) -> Message:
        self._experiments.end(self._owner(context), request.experiment)
        return pb.EndExperimentReply()

    def _revoke_client(self, request: pb.RevokeClientRequest, context: Context) -> Message:
        engine = self._experiments.named(self._owner(context), request.experiment)
        tokens = self._tokens_of(request.subject, engine) if request.subject else []
        if not tokens and not request.slots:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST, "a client is revoked by its slot or its subject."
            )
        return pb.RevokeClientReply(slots=engine.revoke(list(request.slots), tokens))

    def _tokens_of(self, subject: str, engine: TrunkEngine) -> list[str]:
        """Return the tokens of an experiment's clients whose certificates have a name.

        Raises:
            TrunkRefused: There are none, or the trunk asks for no certificates.
        """
        if self._gate is None:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                "the trunk asks for no client certificates (--client-ca), so it knows nobody by a "
                "subject. Name the client's slot: flower-split trunk-revoke … --slot N.",
            )
        tokens = [t for t in self._gate.tokens_of(subject) if engine.knows_token(t)]
        if not tokens:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"no client of the round that was begun last has called with a certificate of "
                f"{printable(subject)}. Name its slot (--slot N), or take the subject off "
                "--allow-client, which holds from the next call on.",
            )
        return tokens

    def _status(self, request: pb.StatusRequest, context: Context) -> Message:
        owner = self._owner(context)
        if request.keep_alive:
            self._experiments.keep_alive(owner, request.experiment)
        return status_to_proto(self._experiments.status(owner, request.experiment))

    def _get_adapter(self, requests: Iterator[bytes], context: Context) -> Iterator[bytes]:
        with (
            Answering(context, "GetAdapter", self._refusals) as call,
            self._require_coordinator(context),
        ):
            data = next(self._first_frames.of(requests), b"")
            call.header = request = parsed(pb.GetAdapterRequest, data)
            engine = self._of(request.experiment, context)
            return Outgoing(pb.Header(reply=pb.ReplyHeader()), engine.adapter()).frames()

    def _of(self, experiment: str, context: Context) -> TrunkEngine:
        """Return the engine of an experiment whose coordinator calls, and note its word."""
        owner = self._owner(context)
        engine = self._experiments.named(owner, experiment)
        self._experiments.heard(owner, experiment)
        return engine

    def _owner(self, context: Context) -> str:
        """Return which coordinator calls; :meth:`_require_coordinator` has let it in.

        Raises:
            TrunkRefused: Its token has been taken off since.
        """
        owner = self._tokens.owner_of(token_of(context))
        if owner is None:
            raise _no_coordinator()
        return owner

    def _require_coordinator(self, context: Context) -> AbstractContextManager[object]:
        self._owner(context)
        return nullcontext()


def _no_coordinator() -> TrunkRefused:
    return TrunkRefused(
        RefusalReason.UNAUTHENTICATED,
        "this call needs the coordinator's token. Give the ServerApp the trunk's token file "
        "(trunk.token-file).",
    )
