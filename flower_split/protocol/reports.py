"""Reports of the trunk as protocol messages, and back: a round's outcome, and where the trunk stands."""

from dataclasses import asdict, fields
from typing import TypeVar

from google.protobuf.message import Message

from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.values import (
    ActivationReport,
    BatchReport,
    ExperimentReport,
    ProcessReport,
    RoundReport,
    SlotReport,
    TrunkStatus,
)

_Report = TypeVar(
    "_Report", ActivationReport, BatchReport, ExperimentReport, ProcessReport, SlotReport
)


def report_to_proto(report: RoundReport) -> pb.PrepareRoundReply:
    """Return the message of a round's outcome."""
    return pb.PrepareRoundReply(
        version=report.version,
        digest=report.digest,
        slots=[pb.SlotReport(**asdict(slot)) for slot in report.slots],
        optimizer_steps=report.optimizer_steps,
        compute_seconds=report.compute_seconds,
        activations=pb.ActivationReport(**asdict(report.activations)),
        batches=pb.BatchReport(**asdict(report.batches)),
    )


def report_from_proto(reply: pb.PrepareRoundReply) -> RoundReport:
    """Return a round's outcome."""
    return RoundReport(
        version=reply.version,
        digest=reply.digest,
        slots=tuple(_of_same_fields(SlotReport, slot) for slot in reply.slots),
        optimizer_steps=reply.optimizer_steps,
        compute_seconds=reply.compute_seconds,
        activations=_of_same_fields(ActivationReport, reply.activations),
        batches=_of_same_fields(BatchReport, reply.batches),
    )


def status_to_proto(status: TrunkStatus) -> pb.StatusReply:
    """Return the message of where the trunk stands."""
    return pb.StatusReply(
        trunk_epoch=status.epoch,
        version=status.version,
        experiment=status.experiment,
        server_round=status.server_round,
        attempt=status.attempt,
        phase=status.phase,
        window=status.window,
        num_tokens=status.num_tokens,
        bytes_received=status.bytes_received,
        bytes_sent=status.bytes_sent,
        slots=[pb.SlotReport(**asdict(slot)) for slot in status.slots],
        problem=status.problem,
        fingerprint=dict(status.fingerprint),
        activations=pb.ActivationReport(**asdict(status.activations)),
        process=pb.ProcessReport(**asdict(status.process)),
        batches=pb.BatchReport(**asdict(status.batches)),
        revoked=status.revoked,
        max_experiments=status.max_experiments,
        experiments=[pb.ExperimentReport(**asdict(one)) for one in status.experiments],
    )


def status_from_proto(reply: pb.StatusReply) -> TrunkStatus:
    """Return where the trunk stands."""
    return TrunkStatus(
        epoch=reply.trunk_epoch,
        version=reply.version,
        experiment=reply.experiment,
        server_round=reply.server_round,
        attempt=reply.attempt,
        phase=reply.phase,
        window=reply.window,
        num_tokens=reply.num_tokens,
        bytes_received=reply.bytes_received,
        bytes_sent=reply.bytes_sent,
        slots=tuple(_of_same_fields(SlotReport, slot) for slot in reply.slots),
        problem=reply.problem,
        fingerprint=dict(reply.fingerprint),
        activations=_of_same_fields(ActivationReport, reply.activations),
        process=_of_same_fields(ProcessReport, reply.process),
        batches=_of_same_fields(BatchReport, reply.batches),
        revoked=tuple(reply.revoked),
        max_experiments=max(1, reply.max_experiments),  # one: a trunk that does not say
        experiments=tuple(_of_same_fields(ExperimentReport, one) for one in reply.experiments),
    )


def _of_same_fields(kind: type[_Report], message: Message) -> _Report:
    """Return the report whose fields a message has under the same names."""
    return kind(**{item.name: getattr(message, item.name) for item in fields(kind)})
