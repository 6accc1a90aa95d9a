"""One participant of a round, as the window machine counts what it gives."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Slot:
    """One participant of the round, and what it has given to the window that is open."""

    planned_steps: int | None = None  # None: has not joined
    dropped: str = ""  # why it no longer takes part
    received: set[int] = field(default_factory=set)  # micro-batch indices in the open window
    last: int | None = None  # index of its last micro-batch in the open window, once known
    contributions: int = 0  # over the round
    num_tokens: float = 0.0  # over the round
    steps_done: int = 0  # windows that have everything from it; 1 where a window is a round
    finished: bool = False  # every planned contribution is in
    must_end_step: bool = False  # a window also needs the end of the slot's step
    step_ended: bool = False  # in the open window

    @property
    def has_all_micro_batches(self) -> bool:
        """Whether the open window has every backward of this slot."""
        return self.last is not None and len(self.received) == self.last + 1

    @property
    def complete(self) -> bool:
        """Whether the open window has everything from this slot."""
        return self.has_all_micro_batches and (self.step_ended or not self.must_end_step)

    def clear(self) -> None:
        """Forget what the open window has from this slot."""
        self.received, self.last, self.step_ended = set(), None, False
