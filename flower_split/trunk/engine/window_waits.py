"""Whom the open window waits for, as the window machine (``windows.py``) says it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from flower_split.protocol.step_every import StepEvery
from flower_split.trunk.engine.phases import Phase

if TYPE_CHECKING:  # windows.py is one of these
    from flower_split.trunk.engine.windows import Slot


class WindowWaits(ABC):
    """The questions about who is missing. The engine's lock is held around every method."""

    slots: "dict[int, Slot]"
    step_every: StepEvery
    phase: Phase
    window: int
    _find_late: Callable[[Collection[int]], Collection[int] | None] | None

    def waiting_for(self) -> str:
        """Say whom the open window still waits for."""
        if self.phase is Phase.JOINING:
            return f"slots {self.missing_joins()} have not joined"
        return f"slots {self.late()} have not contributed to window {self.window}"

    def waited_for(self) -> list[int]:
        """Return the slots that all others wait for now, where they go on together."""
        if self.step_every is not StepEvery.LOCAL_STEP:
            return []
        if self.phase is Phase.JOINING:
            return self.missing_joins()
        there, late = self.present() or [], self.late()
        return late if len(late) < len(there) else []

    def present(self) -> list[int] | None:
        """Return who takes part in the open window now, in slot order; None: none is open."""
        return self._still_there() if self.phase is Phase.OPEN else None

    @property
    def num_planned(self) -> int:
        """How many had planned the open window, with those who have left."""
        return len(self.members())

    def late(self) -> list[int]:
        """Return whom the open window waits for, in slot order."""
        there = self._still_there()
        incomplete = [slot for slot in there if not self.slots[slot].complete]
        if self._find_late is None:
            return incomplete
        found = self._find_late(there)
        if found is None:
            return []
        return [slot for slot in there if slot in found] or incomplete

    def missing_joins(self) -> list[int]:
        """Return who has not joined, in slot order."""
        return [
            slot
            for slot, state in self.slots.items()
            if state.planned_steps is None and not state.dropped
        ]

    @abstractmethod
    def members(self) -> "list[tuple[int, Slot]]":
        """Return who belongs to the open window, dropped ones included."""

    def _still_there(self) -> list[int]:
        return [slot for slot, state in self.members() if not state.dropped]
