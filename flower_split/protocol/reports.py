"""Reports of the trunk as protocol messages, and back: a round's outcome, and where the trunk stands."""

from dataclasses import asdict, fields

from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.values import (
    ActivationReport,
    ProcessReport,
    RoundReport,
    SlotReport,
    TrunkStatus,
)


def report_to_proto(report: RoundReport) -> pb.PrepareRoundReply:
    """Return the message of a round's outcome."""
    return pb.PrepareRoundReply(
        version=report.version,
        digest=report.digest,
        slots=[_slot_to_proto(slot) for slot in report.slots],
        optimizer_steps=report.optimizer_steps,
        compute_seconds=report.compute_seconds,
        activations=_activations_to_proto(report.activations),
    )


def report_from_proto(reply: pb.PrepareRoundReply) -> RoundReport:
    """Return a round's outcome."""
    return RoundReport(
        version=reply.version,
        digest=reply.digest,
        slots=tuple(_slot_from_proto(slot) for slot in reply.slots),
        optimizer_steps=reply.optimizer_steps,
        compute_seconds=reply.compute_seconds,
        activations=_activations_from_proto(reply.activations),
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
        slots=[_slot_to_proto(slot) for slot in status.slots],
        problem=status.problem,
        fingerprint=dict(status.fingerprint),
        activations=_activations_to_proto(status.activations),
        process=pb.ProcessReport(**asdict(status.process)),
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
        slots=tuple(_slot_from_proto(slot) for slot in reply.slots),
        problem=reply.problem,
        fingerprint=dict(reply.fingerprint),
        activations=_activations_from_proto(reply.activations),
        process=ProcessReport(
            **{item.name: getattr(reply.process, item.name) for item in fields(ProcessReport)}
        ),
    )


def _slot_to_proto(slot: SlotReport) -> pb.SlotReport:
    return pb.SlotReport(
        slot=slot.slot,
        completed=slot.completed,
        problem=slot.problem,
        contributions=slot.contributions,
        num_tokens=slot.num_tokens,
        bytes_received=slot.bytes_received,
        bytes_sent=slot.bytes_sent,
        joined=slot.joined,
        waited_seconds=slot.waited_seconds,
        silent_seconds=slot.silent_seconds,
    )


def _slot_from_proto(slot: pb.SlotReport) -> SlotReport:
    return SlotReport(
        slot=slot.slot,
        completed=slot.completed,
        problem=slot.problem,
        contributions=slot.contributions,
        num_tokens=slot.num_tokens,
        bytes_received=slot.bytes_received,
        bytes_sent=slot.bytes_sent,
        joined=slot.joined,
        waited_seconds=slot.waited_seconds,
        silent_seconds=slot.silent_seconds,
    )


def _activations_to_proto(report: ActivationReport) -> pb.ActivationReport:
    return pb.ActivationReport(
        num_bytes=report.num_bytes,
        peak_bytes=report.peak_bytes,
        budget_bytes=report.budget_bytes,
        recomputes=report.recomputes,
        refusals=report.refusals,
    )


def _activations_from_proto(report: pb.ActivationReport) -> ActivationReport:
    return ActivationReport(
        num_bytes=report.num_bytes,
        peak_bytes=report.peak_bytes,
        budget_bytes=report.budget_bytes,
        recomputes=report.recomputes,
        refusals=report.refusals,
    )
