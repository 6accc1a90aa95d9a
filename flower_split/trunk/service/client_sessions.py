"""The clients' control calls of the trunk's service: joining a round, waiting, leaving."""

from functools import partial

import grpc
from google.protobuf.message import Message

from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import cuts_from_proto, grant_to_proto
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.service.control import ControlCalls
from flower_split.trunk.service.handlers import (
    Context,
    Holding,
    Quotas,
    SessionTokens,
    deadline_of,
    token_of,
)
from flower_split.trunk.service.shared_payloads import SharedPayloads


class ClientSessions:
    """What a client's session begins, waits and ends with.

    Args:
        engine: What computes.
        tokens: Which token opened which session.
        shared: Memory that the trunk shares with clients of its host.
        max_tensor_bytes: Limit on the tensors of one call; clients are told.
        max_call_seconds: Longest that a call may wait, whatever its caller asks for.
    """

    def __init__(
        self,
        engine: TrunkEngine,
        tokens: SessionTokens,
        shared: SharedPayloads,
        max_tensor_bytes: int,
        max_call_seconds: float,
    ) -> None:
        self._engine = engine
        self._tokens = tokens
        self._shared = shared
        self._max_tensor_bytes = max_tensor_bytes
        self._max_call_seconds = max_call_seconds

    def handlers(
        self, control: ControlCalls, quotas: Quotas
    ) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        """Return every method by its name.

        Args:
            control: Makes them.
            quotas: Counts the calls in progress.
        """
        at_once = partial(Holding, quotas, waits=False, control=True)
        waiting = partial(Holding, quotas, waits=True, control=True)
        made = control.handler
        return {
            "OpenSession": made(pb.OpenSessionRequest, self._open_session, at_once),
            "WaitVersion": made(pb.WaitVersionRequest, self._wait_version, waiting),
            "ShortenPlan": made(pb.ShortenPlanRequest, self._shorten_plan, at_once),
            "CloseSession": made(pb.CloseSessionRequest, self._close_session, at_once),
            "ShareMemory": made(pb.ShareMemoryRequest, self._share_memory, at_once),
        }

    def _open_session(self, request: pb.OpenSessionRequest, context: Context) -> Message:
        token = token_of(context)
        grant = self._engine.open_session(
            token,
            dict(request.fingerprint),
            request.planned_steps,
            request.evaluate,
            cuts_from_proto(request),
        )
        self._tokens.remember(grant.session, token)
        return grant_to_proto(grant, self._max_tensor_bytes)

    def _wait_version(self, request: pb.WaitVersionRequest, context: Context) -> Message:
        self._tokens.check(
            token_of(context), request.session, request.trunk_epoch, self._engine.epoch
        )
        version = self._engine.wait_version(
            request.session,
            request.trunk_epoch,
            request.version,
            deadline_of(context, self._max_call_seconds),
        )
        return pb.WaitVersionReply(version=version)

    def _shorten_plan(self, request: pb.ShortenPlanRequest, context: Context) -> Message:
        self._tokens.check(
            token_of(context), request.session, request.trunk_epoch, self._engine.epoch
        )
        self._engine.shorten_plan(request.session, request.trunk_epoch, request.planned_steps)
        return pb.ShortenPlanReply()

    def _close_session(self, request: pb.CloseSessionRequest, context: Context) -> Message:
        self._tokens.check(
            token_of(context), request.session, request.trunk_epoch, self._engine.epoch
        )
        self._engine.close_session(request.session, request.trunk_epoch)
        self._shared.drop(token_of(context))
        return pb.CloseSessionReply()

    def _share_memory(self, request: pb.ShareMemoryRequest, context: Context) -> Message:
        return self._shared.offer(request, token_of(context))
