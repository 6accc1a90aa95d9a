"""Round control of a trunk over gRPC: begin, prepare, commit and abort rounds; status; adapter.

Every call may be repeated: the trunk recognises a round by its experiment, number and attempt.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from flower_split.config.validation import ENVIRONMENT, Scalar
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import (
    arrivals_to_proto,
    plan_to_proto,
    settings_to_proto,
)
from flower_split.protocol.reports import report_from_proto, status_from_proto
from flower_split.protocol.values import Arrival, RoundPlan, RoundReport, TrunkStatus
from flower_split.runtime.secret_files import TokenFile
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.grpc_transport import TrunkChannel
from flower_split.wire.receiving import Incoming

_SHORT_SECONDS = 10.0  # for calls that must not hold up the coordinator when the trunk is gone
_MAX_ADAPTER_BYTES = 1 << 36  # a fully trained trunk may be large; its server is trusted


class TrunkCoordinator:
    """Control the rounds of one trunk. Thread-safe. :meth:`close` ends its connections.

    Every method raises :class:`~flower_split.errors.TrunkUnavailable` when there is no answer within
    ``timeout``, :class:`~flower_split.errors.TrunkRefused` with the trunk's reason, and
    :class:`~flower_split.errors.RoundAborted` where the round has been given up.

    Args:
        address: ``host:port``.
        token: The trunk's coordinator token; of a file, as it is with each call.
        root_certificates: CA for TLS, as PEM text or a PEM file's path; empty: plain text, loopback.
        timeout: Seconds per call, retries included; at most 10 for status and abort.
        certificate: What this side shows over TLS.
        proxy: As ``trunk.proxy`` says.
        experiment: The one, of several at the trunk, that status, adapter and revocations are of;
            empty: the one whose rounds are begun here.

    Raises:
        ConfigError: Plain text to another machine, or a PEM file that cannot be read.
    """

    def __init__(
        self,
        address: str,
        token: str | TokenFile,
        root_certificates: str = "",
        timeout: float = 150.0,
        certificate: ClientCertificate = NO_CERTIFICATE,
        proxy: str = ENVIRONMENT,
        experiment: str = "",
    ) -> None:
        self.address = address
        self._experiment = experiment
        self._settings: Mapping[str, Scalar] | None = None
        self._timeout = timeout
        self._channel = TrunkChannel(
            address,
            token=token,
            timeout=timeout,
            root_certificates=root_certificates,
            certificate=certificate,
            proxy=proxy,
        )

    def bring(self, settings: Mapping[str, Scalar]) -> None:
        """Say how this experiment trains, with every round: for a trunk that serves several."""
        self._settings = dict(settings)

    def begin_round(self, plan: RoundPlan) -> tuple[int, int]:
        """Open a round for its participants; return ``(epoch, version)`` of the trunk."""
        self._experiment = plan.experiment
        request = plan_to_proto(plan)
        if self._settings is not None:
            request.settings.CopyFrom(settings_to_proto(self._settings))
        reply = self._channel.unary("BeginRound", request, pb.BeginRoundReply)
        return reply.trunk_epoch, reply.version

    def prepare_round(
        self,
        experiment: str,
        server_round: int,
        attempt: int,
        arrivals: Sequence[Arrival] = (),
    ) -> RoundReport:
        """Close the round to contributions and return who completed what (commit's first phase).

        Args:
            experiment: Experiment of the round.
            server_round: Number of the round.
            attempt: Attempt at the round.
            arrivals: The arrivals of an asynchronous round: whose work makes its step.
        """
        request = pb.PrepareRoundRequest(
            experiment=experiment,
            server_round=server_round,
            attempt=attempt,
            arrivals=arrivals_to_proto(arrivals),
        )
        return report_from_proto(self._channel.unary("PrepareRound", request, pb.PrepareRoundReply))

    def commit_round(self, experiment: str, server_round: int, attempt: int) -> int:
        """Keep the prepared round's steps (commit's second phase); return the trunk's version."""
        request = pb.CommitRoundRequest(
            experiment=experiment, server_round=server_round, attempt=attempt
        )
        return self._channel.unary("CommitRound", request, pb.CommitRoundReply).version

    def abort_round(self, experiment: str, server_round: int, attempt: int, why: str) -> int:
        """Roll back to the round's beginning, or end an evaluation; return the version."""
        request = pb.AbortRoundRequest(
            experiment=experiment, server_round=server_round, attempt=attempt, why=why
        )
        timeout = min(self._timeout, _SHORT_SECONDS)
        return self._channel.unary(
            "AbortRound", request, pb.AbortRoundReply, timeout=timeout
        ).version

    def end_experiment(self) -> None:
        """Let the trunk forget the experiment, where it serves several; what is committed stays."""
        if self._experiment:
            request = pb.EndExperimentRequest(experiment=self._experiment)
            timeout = min(self._timeout, _SHORT_SECONDS)
            self._channel.unary("EndExperiment", request, pb.EndExperimentReply, timeout=timeout)

    def revoke_client(self, slots: Sequence[int], subject: str = "") -> list[int]:
        """Take clients out of the experiment, by slot or by a name in their certificate.

        Returns:
            The slots that are out now.
        """
        request = pb.RevokeClientRequest(slots=slots, subject=subject, experiment=self._experiment)
        timeout = min(self._timeout, _SHORT_SECONDS)
        reply = self._channel.unary("RevokeClient", request, pb.RevokeClientReply, timeout=timeout)
        return list(reply.slots)

    def status(self) -> TrunkStatus:
        """Return where the trunk stands."""
        timeout = min(self._timeout, _SHORT_SECONDS)
        request = pb.StatusRequest(experiment=self._experiment)
        return status_from_proto(
            self._channel.unary("Status", request, pb.StatusReply, timeout=timeout)
        )

    def keep_alive(self) -> None:
        """Say that this coordinator lives; see ``RoundPlan.coordinator_seconds``."""
        timeout = min(self._timeout, _SHORT_SECONDS)
        request = pb.StatusRequest(keep_alive=True, experiment=self._experiment)
        self._channel.unary("Status", request, pb.StatusReply, timeout=timeout)

    def get_adapter(self) -> dict[str, Tensor]:
        """Return the trunk's trainable parameters, fp32 on the CPU, by the unsplit model's names."""
        return self._channel.download(
            "GetAdapter",
            pb.GetAdapterRequest(experiment=self._experiment),
            lambda frames: Incoming(frames).receive(_MAX_ADAPTER_BYTES).tensors,
        )

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._channel.close()
