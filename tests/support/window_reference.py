"""What the trunk promises about windows and repeated calls, as a model without tensors or threads.

Written from the protocol's description, not from the engine: membership of a window is declared
beforehand; a contribution counts once whatever is repeated, lost or reordered; a window that is
complete is one optimizer step; a deadline or a leaver is judged by the quorum; an abort forgets
the attempt. Every operation answers with a word: ``ok``, ``repeat`` (the stored reply), ``wait``,
``ABORTED``, or the name of the refusal.
"""

from dataclasses import dataclass, field

Contribution = tuple[int, int, float]  # content of the forward, of the backward, label tokens
Step = dict[int, dict[int, Contribution]]  # slot -> micro-batch -> what it gave


@dataclass
class Member:
    plan: int | None = None  # optimizer steps it will take
    out: bool = False
    given: dict[int, Contribution] = field(default_factory=dict)  # to the open window
    last: int | None = None
    finished: bool = False
    count: int = 0
    tokens: float = 0.0

    @property
    def complete(self) -> bool:
        return self.last is not None and set(self.given) == set(range(self.last + 1))


class ReferenceRound:
    """One attempt of one round."""

    def __init__(self, slots: list[int], quorum: float, *, per_round: bool) -> None:
        self.members = {slot: Member() for slot in sorted(slots)}
        self.quorum = quorum
        self.per_round = per_round  # one window for the round, else one for every local step
        self.window = 0
        self.aborted = False
        self.steps: list[Step] = []
        self.calls: dict[tuple[str, int, int, int], int] = {}  # answered call -> content
        self.frontier = dict.fromkeys(slots, (0, 0))  # everything before is acknowledged
        self.open_forwards: dict[tuple[int, int, int], int] = {}  # -> content

    # ---- the clients

    def join(self, slot: int, plan: int) -> str:
        member = self.members[slot]
        if self.aborted:
            return "ABORTED"
        if member.out:
            return "DROPPED"
        if plan < 1 or member.plan not in (None, plan):
            return "INVALID_REQUEST"
        member.plan = plan
        return "ok"

    def forward(
        self,
        slot: int,
        window: int,
        micro_batch: int,
        lag: int,
        content: int,
        acknowledged: int = 0,
    ) -> str:
        """``lag``: how many steps the version asked for is behind that of the window.

        ``acknowledged``: the client has every reply of this window before that micro-batch.
        """
        if self.aborted:
            return "ABORTED"
        name = ("forward", slot, window, micro_batch)
        if self.frontier[slot][0] == window and micro_batch < self.frontier[slot][1]:
            if not self._refused(slot, window):
                return "STALE_VERSION"
        if name in self.calls:
            return "repeat" if self.calls[name] == content else "DIGEST_MISMATCH"
        refused = self._refused(slot, window)
        if refused == "STALE_VERSION" and window - lag > self.window:
            refused = "wait"
        if refused:
            return refused
        if lag:
            return "STALE_VERSION"
        here = (window, min(acknowledged, micro_batch))
        self.frontier[slot] = max(self.frontier[slot], here)
        for old in [call for call in self.calls if call[1] == slot]:
            if old[2:] < self.frontier[slot]:
                del self.calls[old]
        self.calls[name] = content
        self.open_forwards[name[1:]] = content
        return "ok"

    def backward(
        self, slot: int, window: int, micro_batch: int, content: int, tokens: float, last: bool
    ) -> str:
        if self.aborted:
            return "ABORTED"
        name = ("backward", slot, window, micro_batch)
        if (window, micro_batch) < self.frontier[slot]:
            return "STALE_VERSION"
        if name in self.calls:
            return "repeat" if self.calls[name] == content else "DIGEST_MISMATCH"
        refused = self._refused(slot, window)
        if refused:
            return refused
        if name[1:] not in self.open_forwards:
            return "UNKNOWN_CONTRIBUTION"
        member = self.members[slot]
        end = micro_batch if last else member.last
        if end is not None and max([micro_batch, *member.given]) > end:
            return "INVALID_REQUEST"
        self.calls[name] = content
        member.given[micro_batch] = (self.open_forwards.pop(name[1:]), content, tokens)
        member.last = end
        member.count += 1
        member.tokens += tokens
        if member.complete and (self.per_round or window + 1 == member.plan):
            member.finished = True
        self._step()
        return "ok"

    def leave(self, slot: int) -> None:
        if not self.aborted and not self.members[slot].finished:
            self._out([slot])

    # ---- time and the coordinator

    def expire(self) -> None:
        """The deadline that is awaited has passed; none is where a window is a whole round."""
        if self.aborted or self.per_round or self.done:
            return
        absent = [s for s, m in self.members.items() if m.plan is None and not m.out]
        late = [s for s, m in self._of_window() if not m.out and not m.complete]
        self._out(absent or late)

    def prepare(self) -> str:
        if not self.aborted:
            self._out([s for s, m in self.members.items() if not m.finished and not m.out])
        return "ABORTED" if self.aborted else "ok"

    def abort(self) -> None:
        self.aborted = True
        self.steps, self.open_forwards = [], {}

    @property
    def done(self) -> bool:
        return all(m.out or m.finished for m in self.members.values()) and not self._full()

    # ---- inside

    def _refused(self, slot: int, window: int) -> str:
        member = self.members[slot]
        if member.out:
            return "DROPPED"
        if window >= (1 if self.per_round else member.plan or 0):
            return "INVALID_REQUEST"
        return "" if window == self.window else "STALE_VERSION"

    def _of_window(self) -> list[tuple[int, Member]]:
        if self.per_round:
            return list(self.members.items()) if self.window == 0 else []
        return [(s, m) for s, m in self.members.items() if m.plan is None or m.plan > self.window]

    def _full(self) -> list[int]:
        alive = [(s, m) for s, m in self._of_window() if not m.out]
        return [s for s, _ in alive] if all(m.complete for _, m in alive) else []

    def _step(self) -> None:
        slots = self._full()
        if not slots or any(m.plan is None and not m.out for m in self.members.values()):
            return
        self.steps.append({slot: dict(self.members[slot].given) for slot in slots})
        self.window += 1
        for member in self.members.values():
            member.given, member.last = {}, None
        self.open_forwards = {}

    def _out(self, slots: list[int]) -> None:
        for slot in slots:
            member = self.members[slot]
            member.out, member.given, member.last = True, {}, None
            for name in [name for name in self.open_forwards if name[0] == slot]:
                del self.open_forwards[name]
        window = self._of_window()
        there = sum(not m.out for _, m in window)
        nobody = all(m.out for m in self.members.values())
        if slots and (nobody or there < self.quorum * len(window) - 1e-9):
            self.abort()
            return
        self._step()
