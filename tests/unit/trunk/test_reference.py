"""The engine and the reference model of its windows agree, whatever happens in whatever order."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flower_split.trunk.engine.ledger import Ledger
from flower_split.trunk.engine.windows import WindowMachine
from tests.support.engine_rig import Rig, Violation
from tests.support.window_reference import ReferenceRound

SLOTS = [0, 2, 5]

slots = st.sampled_from(SLOTS)
windows = st.integers(0, 2)
micro_batches = st.integers(0, 2)


class EngineMachine(RuleBasedStateMachine):
    """Duplicate, reorder, go stale, lie, leave, kill, expire, seal, abort, begin again."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.seeded = random.Random(0)

    def teardown(self) -> None:
        self.rig.close()

    @initialize(quorum=st.sampled_from([1.0, 0.5, 0.34]), per_round=st.booleans())
    def first(self, quorum: float, per_round: bool) -> None:
        self.rig.begin(SLOTS, quorum, per_round=per_round)

    @property
    def joined(self) -> set[int]:
        here = (self.rig.server_round, self.rig.attempt)
        return {slot for (*place, slot) in self.rig.grants if tuple(place) == here}

    @rule(slot=slots, plan=st.sampled_from([0, 1, 2, 2, 2]))
    def join(self, slot: int, plan: int) -> None:
        self.rig.join(slot, plan)

    @rule(plan=st.integers(1, 2))
    def join_all(self, plan: int) -> None:
        for slot in SLOTS:
            self.rig.join(slot, plan)

    @rule(slot=slots, window=windows, micro_batch=micro_batches, lag=st.sampled_from([0, 0, 0, 1]),
          content=st.sampled_from([0, 0, 0, 1]), acknowledged=st.sampled_from([0, 0, 0, 1, 2]))  # fmt: skip
    def forward(
        self, slot: int, window: int, micro_batch: int, lag: int, content: int, acknowledged: int
    ) -> None:
        if slot in self.joined:
            self.rig.forward(
                slot, window, micro_batch, lag=lag, content=content, acknowledged=acknowledged
            )

    @rule(slot=slots, window=windows, micro_batch=micro_batches, last=st.booleans(),
          content=st.sampled_from([0, 0, 0, 1]), tokens=st.sampled_from([1.0, 2.0]))  # fmt: skip
    def backward(
        self, slot: int, window: int, micro_batch: int, last: bool, content: int, tokens: float
    ) -> None:
        if slot in self.joined:
            self.rig.backward(slot, window, micro_batch, content=content, last=last, tokens=tokens)

    @rule(micro_batch_count=st.integers(1, 2), content=st.integers(0, 9))
    def everybody_steps(self, micro_batch_count: int, content: int) -> None:
        """The ordinary course, so that deep states are reached."""
        model = self.rig.reference
        window = model.window
        for slot in sorted(self.joined):
            member = model.members[slot]
            if self.rig.committed or member.out or member.given:
                continue
            for index in range(micro_batch_count):
                self.rig.forward(slot, window, index, content=content)
            for index in range(micro_batch_count):
                last = index == micro_batch_count - 1
                self.rig.backward(slot, window, index, content=content, last=last)

    @rule(slot=slots)
    def leave(self, slot: int) -> None:
        self.rig.leave(slot)

    @precondition(lambda self: not self.rig.committed and not self.rig.prepared)
    @rule()
    def expire(self) -> None:
        self.rig.expire()

    @precondition(lambda self: not self.rig.committed and not self.rig.prepared)
    @rule()
    def abort(self) -> None:
        self.rig.abort()

    @precondition(lambda self: not self.rig.committed and not self.rig.prepared)
    @rule()
    def prepare(self) -> None:
        self.rig.prepare()

    @precondition(lambda self: self.rig.prepared and not self.rig.committed)
    @rule()
    def commit(self) -> None:
        self.rig.commit()

    @rule(quorum=st.sampled_from([1.0, 0.5, 0.34]), per_round=st.booleans())
    def begin(self, quorum: float, per_round: bool) -> None:
        self.rig.begin(SLOTS, quorum, per_round=per_round)

    @rule(data=st.data())
    def zombie(self, data: st.DataObject) -> None:
        here = (self.rig.server_round, self.rig.attempt)
        dead = sorted(key for key in self.rig.grants if key[:2] != here)
        if dead:
            server_round, attempt, slot = data.draw(st.sampled_from(dead))
            self.rig.zombie((server_round, attempt), slot)

    @invariant()
    def agree(self) -> None:
        self.rig.compare()


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def lossy_run(operations: int, seed: int) -> Rig:
    """Clients train over a network that loses, repeats and reorders a fifth of everything.

    A client sends a call again until it has an answer; every message may be lost on its way there
    or back, or arrive twice; what is in flight arrives in any order.
    """
    rig, chance = Rig(), random.Random(seed)
    plan, micro_batches = 4, 2
    while rig.operations < operations:
        per_round = chance.random() < 0.3
        rig.begin(SLOTS, 1.0, per_round=per_round)
        for slot in SLOTS:
            rig.join(slot, plan)
        # Per slot: the calls it has yet to get an answer to, in the order in which it may send them.
        todo = {slot: list(_calls(plan, micro_batches, per_round)) for slot in SLOTS}
        late: list[tuple[int, tuple[str, int, int, bool]]] = []  # duplicates still in flight
        while any(todo.values()):
            slot = chance.choice([s for s in SLOTS if todo[s]])
            ready = _ready(todo[slot])
            call = chance.choice(ready)
            late += [(slot, call)] * (chance.random() < 0.2)
            if chance.random() < 0.2:
                continue  # lost on its way to the trunk
            word = _send(rig, slot, call, _acknowledged(call, todo[slot]))
            if chance.random() < 0.2:
                continue  # the reply is lost
            if word in ("ok", "repeat"):
                todo[slot].remove(call)
            if late and chance.random() < 0.3:
                _send(rig, *late.pop(chance.randrange(len(late))))
        for slot, call in late:
            _send(rig, slot, call)
        rig.prepare()
        rig.commit()
    return rig


def _calls(plan: int, micro_batches: int, per_round: bool):
    for step in range(plan):
        for kind in ("forward", "backward"):
            for index in range(micro_batches):
                last = index == micro_batches - 1
                if per_round:
                    yield kind, 0, step * micro_batches + index, last and step == plan - 1
                else:
                    yield kind, step, index, last


def _ready(calls):
    """Micro-batches of the step in progress go in any order; a backward follows its forward."""
    kind, window, index, _ = calls[0]
    same = [call for call in calls if call[0] == kind and call[1] == window]
    return [call for call in same if call[2] // 2 == index // 2]


def _acknowledged(call, calls) -> int:
    """The first micro-batch of the call's window that has not had all its replies."""
    return min(index for _, window, index, _ in calls if window == call[1])


def _send(rig: Rig, slot: int, call: tuple[str, int, int, bool], acknowledged: int = 0) -> str:
    kind, window, index, last = call
    content = 100 * slot + 10 * window + index
    if kind == "forward":
        return rig.forward(slot, window, index, content=content, acknowledged=acknowledged)
    tokens = 1.0 + slot % 2
    return rig.backward(slot, window, index, content=content, tokens=tokens, last=last)


def test_lossy_network_engine_equals_reference():
    rig = lossy_run(1500, seed=1)
    rig.close()


@pytest.mark.slow
def test_lossy_network_long_run_has_no_violation():
    rig = lossy_run(100_000, seed=2)
    rig.close()
    assert rig.operations >= 100_000


def test_lossy_network_without_dedupe_is_caught(monkeypatch):
    def forgetful(self, name, *call):
        self.forget(name)
        return original(self, name, *call)

    original = Ledger.claim
    monkeypatch.setattr(Ledger, "claim", forgetful)
    with pytest.raises(Violation):
        lossy_run(1500, seed=1).close()


def test_window_machine_that_ignores_a_leaver_is_caught(monkeypatch):
    monkeypatch.setattr(WindowMachine, "_check_quorum", lambda self: None)
    rig = Rig()
    rig.begin(SLOTS, 1.0, per_round=False)
    for slot in SLOTS:
        rig.join(slot, 1)
    with pytest.raises(Violation, match="aborted"):
        rig.leave(0)
    rig.close()


def test_reference_counts_a_contribution_once():
    model = ReferenceRound([0], 1.0, per_round=False)
    assert model.join(0, 1) == "ok"
    assert model.forward(0, 0, 0, 0, 7) == "ok"
    assert model.backward(0, 0, 0, 7, 1.0, True) == "ok"
    assert model.backward(0, 0, 0, 7, 1.0, True) == "repeat"
    assert model.steps == [{0: {0: (7, 7, 1.0)}}]
