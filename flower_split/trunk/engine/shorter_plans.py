"""A participant that takes fewer optimizer steps than it has planned."""

from typing import TYPE_CHECKING

from flower_split.errors import RefusalReason, TrunkRefused

if TYPE_CHECKING:  # windows.py lets its slots do this
    from flower_split.trunk.engine.windows import Slot


def shorten(state: "Slot", slot: int, planned_steps: int, whole_round: bool) -> None:
    """Make a slot's plan smaller; with the steps that it has done, it is finished. Idempotent.

    Args:
        state: The slot's.
        slot: Whose, for errors.
        planned_steps: Steps in all.
        whole_round: A window is a round: what the slot has sent is all that it gives.

    Raises:
        TrunkRefused: It is more than before, or fewer than are done; nothing has changed.
    """
    planned = state.planned_steps or 0
    if planned_steps == planned:
        return
    if not max(1, 0 if whole_round else state.steps_done) <= planned_steps < planned:
        raise TrunkRefused(
            RefusalReason.INVALID_REQUEST,
            f"slot {slot} planned {planned} steps, has done {state.steps_done}, and now plans "
            f"{planned_steps}. A plan can only be made smaller, down to what is done; a client that "
            "has done nothing closes its session.",
        )
    if whole_round and sorted(state.received) != list(range(len(state.received) or 1)):
        raise TrunkRefused(
            RefusalReason.INVALID_REQUEST,
            f"slot {slot} stops, and micro-batches before its last one are missing: it has sent "
            f"{sorted(state.received)}.",
        )
    state.planned_steps = planned_steps
    if whole_round:
        state.last = len(state.received) - 1
        state.steps_done = 1
    state.finished = whole_round or state.steps_done == planned_steps
    if state.finished and not state.complete:
        state.clear()
