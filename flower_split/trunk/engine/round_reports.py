"""What a round tells of itself; :class:`~flower_split.trunk.engine.round_state.Round` has the state."""

from dataclasses import replace

from flower_split.protocol.values import (
    BatchReport,
    RoundPlan,
    RoundReport,
    SlotReport,
    TrunkStatus,
)
from flower_split.trunk.compute.activations import ActivationCache
from flower_split.trunk.engine.shares import Usage
from flower_split.trunk.engine.windows import WindowMachine


class RoundReports:
    """The reports of a round. The engine's lock is held around every method."""

    plan: RoundPlan
    windows: WindowMachine
    activations: ActivationCache
    usage: Usage
    report: RoundReport | None
    committed: bool

    def batch_report(self) -> BatchReport:
        """Return the figures of the joint batches so far."""
        return BatchReport()

    def slot_reports(self) -> tuple[SlotReport, ...]:
        """Return what every participant has done so far."""
        return tuple(
            SlotReport(
                slot=slot,
                completed=state.finished,
                problem=state.dropped,
                contributions=state.contributions,
                num_tokens=state.num_tokens,
                bytes_received=self.usage.received[slot],
                bytes_sent=self.usage.sent[slot],
            )
            for slot, state in self.windows.slots.items()
        )

    def final_reports(self) -> tuple[SlotReport, ...]:
        """Return what the participants did, once :meth:`finish` has been called."""
        return self.slot_reports()

    def described(self, base: TrunkStatus) -> TrunkStatus:
        """Return ``base`` with where this round stands."""
        slots = self.slot_reports()
        phase = "idle" if self.committed else self.windows.phase.value
        return replace(
            base,
            server_round=self.plan.server_round,
            attempt=self.plan.attempt,
            phase="prepared" if self.report and phase == "done" else phase,
            window=self.windows.window,
            num_tokens=sum(slot.num_tokens for slot in slots),
            bytes_received=self.usage.received.total(),
            bytes_sent=self.usage.sent.total(),
            slots=slots,
            problem=self.windows.problem,
            activations=self.activations.report(),
        )
