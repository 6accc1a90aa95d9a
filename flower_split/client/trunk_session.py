"""One client's session with a served trunk: joining the round, and leaving it. Thread-safe.

:class:`flower_split.client.remote_trunk.RemoteTrunk` is a module around it.
"""

import logging
from collections.abc import Mapping

from flower_split.client.calls import SessionCalls
from flower_split.errors import TrunkError
from flower_split.parties.fingerprint import CODEC, GRADIENT_CODEC
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import cuts_to_proto, grant_from_proto
from flower_split.protocol.values import SessionGrant
from flower_split.split import CutLayers
from flower_split.wire.codecs import NATIVE, WireCodecs
from flower_split.wire.transport import Transport

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 2.0  # a trunk that has gone must not hold up a client that is done


class TrunkSession:
    """A session, from :meth:`open` to :meth:`close`.

    Args:
        channel: The connections, with this client's token of the round.
        fingerprint: Fingerprint of the model and configuration; names the codecs.
        cuts: Where the client's model is cut; None: where the fingerprint says.
        call_timeout: Seconds per call, retries and the wait for other clients included.

    Attributes:
        calls: The session's calls.
        evaluate: Whether the session only evaluates.

    Raises:
        ConfigError: There is no such codec.
    """

    def __init__(
        self,
        channel: Transport,
        fingerprint: Mapping[str, str],
        cuts: CutLayers | None,
        call_timeout: float,
    ) -> None:
        names = fingerprint.get(CODEC, NATIVE), fingerprint.get(GRADIENT_CODEC, "")
        self.calls = SessionCalls(channel, WireCodecs.make(*names))
        self.evaluate = False
        self._fingerprint = dict(fingerprint)
        self._cuts = cuts
        self._call_timeout = call_timeout

    def open(self, planned_steps: int, *, evaluate: bool = False) -> SessionGrant:
        """See :meth:`flower_split.client.remote_trunk.RemoteTrunk.open`."""
        calls = self.calls
        if calls.grant is not None:
            raise TrunkError("this RemoteTrunk has a session already; make a new one per round.")
        request = pb.OpenSessionRequest(
            fingerprint=self._fingerprint,
            planned_steps=planned_steps,
            evaluate=evaluate,
            cuts=cuts_to_proto(self._cuts),
        )
        with calls.waiting():
            reply = calls.channel.unary("OpenSession", request, pb.OpenSessionReply)
        self.evaluate = evaluate
        calls.max_tensor_bytes = reply.max_tensor_bytes
        calls.without_zeros = reply.without_zeros
        calls.grant = grant_from_proto(reply)
        logger.debug(
            "session open: slot=%d round=%d version=%d",
            reply.slot,
            reply.server_round,
            reply.version,
        )
        return calls.grant

    def shorten_plan(self, planned_steps: int) -> None:
        """See :meth:`flower_split.client.remote_trunk.RemoteTrunk.shorten_plan`."""
        grant = self.calls.require()
        request = pb.ShortenPlanRequest(
            session=grant.session, trunk_epoch=grant.epoch, planned_steps=planned_steps
        )
        with self.calls.waiting():
            self.calls.channel.unary("ShortenPlan", request, pb.ShortenPlanReply)

    def close(self) -> None:
        """Leave the round and close the connections. Idempotent; raises nothing of the trunk's."""
        grant, self.calls.grant = self.calls.grant, None
        if grant is not None:
            request = pb.CloseSessionRequest(session=grant.session, trunk_epoch=grant.epoch)
            try:
                self.calls.channel.unary(
                    "CloseSession",
                    request,
                    pb.CloseSessionReply,
                    timeout=min(self._call_timeout, _CLOSE_SECONDS),
                )
            except TrunkError as error:
                logger.debug("the session ends without the trunk's answer: %s", error)
        self.calls.channel.close()

    def wait_version(self, version: int) -> int:
        """See :meth:`flower_split.client.remote_trunk.RemoteTrunk.wait_version`."""
        grant = self.calls.require()
        request = pb.WaitVersionRequest(
            session=grant.session, trunk_epoch=grant.epoch, version=version
        )
        with self.calls.waiting():
            return self.calls.channel.unary("WaitVersion", request, pb.WaitVersionReply).version
