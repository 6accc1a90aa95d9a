"""Windows whose micro-batches are computed together: order of arrival, retries, and who leaves when.

Every expected weight is worked out by hand: the toy trunk is ``h ↦ h · W``.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flower_split.aggregation.rules.parse import parse_rules
from flower_split.config import OptimizerConfig
from flower_split.errors import (
    ConfigError,
    RefusalReason,
    RoundAborted,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import FinishRule, RoundReport
from flower_split.trunk.compute.gradients import Reduction
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.engine_rig import ManualClock
from tests.support.toy_trunk import HIDDEN, ToyClient, ToyTrunk, make_engine, make_plan

TOKENS = {0: 2.0, 1: 6.0, 2: 3.0}
ROWS = {0: 2, 1: 1, 2: 3}
LENGTHS = {0: 4, 1: 7, 2: 5}
ADAMW = OptimizerConfig(name="adamw", learning_rate=0.1)
START = ToyTrunk().weight.detach()


class Rig:
    """An engine with window batches, clients, and a thread for each call that waits."""

    def __init__(self, slots: Sequence[int] = (0, 1, 2), steps: int = 1, **settings: object):
        plan = {
            name: settings.pop(name)
            for name in ("quorum", "attempt", "finish", "step_every", "window_seconds")
            if name in settings
        }
        self.engine: TrunkEngine = make_engine(batch_positions=1000, **settings)
        self.engine.begin_round(make_plan(slots, **plan))
        self.attempt = int(plan.get("attempt", 0))
        self.clients = {slot: ToyClient(self.engine, slot, steps) for slot in slots}
        self.pool = ThreadPoolExecutor(16)

    def start(self, run: Callable[[], object]) -> Future:
        """Make a call, and return when the engine has taken it."""
        before = self.engine.inspect().num_replies
        future = self.pool.submit(run)
        until(lambda: self.engine.inspect().num_replies != before or future.done())
        return future

    def forward(self, slot: int, window: int = 0, index: int = 0, last: bool = True) -> Future:
        digest = f"f{window}{index}".encode()
        return self.start(
            lambda: self.clients[slot].forward(
                hidden(slot, window, index), window, index, last=last, digest=digest
            )
        )

    def backward(
        self, slot: int, window: int = 0, index: int = 0, last: bool = True, **changes: object
    ) -> Future:
        given = {"num_tokens": TOKENS[slot], "digest": f"b{window}{index}".encode(), **changes}
        gradient = given.pop("grad", None)
        gradient = grad(slot, window, index) if gradient is None else gradient
        return self.start(
            lambda: self.clients[slot].backward(gradient, window, index, last=last, **given)
        )

    def prepare(self) -> RoundReport:
        return self.engine.prepare_round("test", 1, self.attempt, time.monotonic() + 10)

    def weight(self) -> Tensor:
        return self.engine.adapter()["weight"]

    def close(self) -> None:
        self.engine.close()
        self.pool.shutdown()


@pytest.fixture
def rigs() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(*args: object, **settings: object) -> Rig:
        made.append(Rig(*args, **settings))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def until(reached: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0)


def numbers(slot: int, window: int, index: int, kind: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * kind + 100 * slot + 10 * window + index)
    return torch.randn(ROWS[slot], LENGTHS[slot], HIDDEN, generator=generator)


def hidden(slot: int, window: int = 0, index: int = 0) -> Tensor:
    return numbers(slot, window, index, 0)


def grad(slot: int, window: int = 0, index: int = 0) -> Tensor:
    return numbers(slot, window, index, 1)


def gradient(slot: int, window: int = 0, index: int = 0) -> Tensor:
    """dL/dW of ``h @ W``, by hand."""
    rows = hidden(slot, window, index).reshape(-1, HIDDEN)
    return rows.T @ grad(slot, window, index).reshape(-1, HIDDEN)


def stepped(counts: Mapping[int, int]) -> Tensor:
    """The weight after a window of so many micro-batches of each slot."""
    total = sum(TOKENS[slot] * count for slot, count in counts.items())
    summed = sum(
        TOKENS[slot] * gradient(slot, 0, index)
        for slot, count in counts.items()
        for index in range(count)
    )
    return START - 0.5 * summed / total


def refused(future: Future, reason: RefusalReason) -> TrunkRefused:
    error = future.exception(timeout=10)
    assert isinstance(error, TrunkRefused) and error.reason is reason, error
    return error


# ---------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_window_of_unequal_clients_is_one_batch_in_any_order_of_arrival(rigs, order):
    rig = rigs()
    forwards = {slot: rig.forward(slot) for slot in order}
    for slot in order:
        torch.testing.assert_close(forwards[slot].result(10).tensor, hidden(slot) @ START)
    backwards = {slot: rig.backward(slot) for slot in reversed(order)}
    for slot in order:
        torch.testing.assert_close(backwards[slot].result(10).tensor, grad(slot) @ START.T)
    report = rig.prepare()
    torch.testing.assert_close(rig.weight(), stepped({0: 1, 1: 1, 2: 1}))
    assert [slot.num_tokens for slot in report.slots] == list(TOKENS.values())
    assert (report.batches.batches, report.batches.partial) == (1, 0)
    assert report.optimizer_steps == 1


def run_windows(rig: Rig, counts: Mapping[int, int], orders: Iterator[Sequence[int]]) -> str:
    """Two windows of so many micro-batches of each slot, two in flight; return the digest."""
    for window in range(2):
        backwards: list[Future] = []
        for index in range(max(counts.values())):
            there = [slot for slot in next(orders) if index < counts[slot]]
            last = {slot: index == counts[slot] - 1 for slot in there}
            forwards = [rig.forward(slot, window, index, last[slot]) for slot in there]
            for future in [*forwards, *backwards]:
                future.result(10)
            backwards = [rig.backward(slot, window, index, last[slot]) for slot in there[::-1]]
        for future in backwards:
            future.result(10)
    return rig.prepare().digest


def test_digest_of_unequal_micro_batch_counts_is_the_same_in_every_order(rigs):
    every = list(itertools.permutations(range(3)))
    digests = set()
    for start in range(6):
        orders = itertools.cycle(every[start:] + every[:start])
        rig = rigs(steps=2, optimizer=ADAMW, dropout=0.3)
        digests.add(run_windows(rig, {0: 1, 1: 3, 2: 2}, orders))
    assert len(digests) == 1


def test_micro_batches_of_unequal_counts_add_to_the_hand_made_sum(rigs):
    rig = rigs()
    counts = {0: 1, 1: 3, 2: 2}
    for index in range(3):
        there = [slot for slot in (2, 0, 1) if index < counts[slot]]
        for call in (rig.forward, rig.backward):
            calls = [call(slot, 0, index, index == counts[slot] - 1) for slot in there]
            for future in calls:
                future.result(10)
    report = rig.prepare()
    torch.testing.assert_close(rig.weight(), stepped(counts))
    assert report.batches.batches == 3


def test_batch_of_the_next_micro_batch_does_not_wait_for_a_client_that_is_done(rigs):
    rig = rigs((0, 1))
    first = [rig.forward(0, 0, 0, last=True), rig.forward(1, 0, 0, last=False)]
    for future in first:
        future.result(10)
    rig.forward(1, 0, 1, last=True).result(10)  # before anybody's backward


def test_one_client_alone_has_the_bits_of_autograd(rigs):
    rig = rigs((0,))
    reference = ToyTrunk()
    leaf = hidden(0).requires_grad_()
    reference(leaf).backward(grad(0))
    torch.optim.SGD(reference.parameters(), lr=0.5).step()
    rig.forward(0).result(10)
    assert torch.equal(rig.backward(0, num_tokens=7.0).result(10).tensor, leaf.grad)
    rig.prepare()
    assert torch.equal(rig.weight(), reference.weight.detach())


def test_steps_end_together_by_one_norm(rigs):
    """The clip factor is that of the norm over the clients' part and the trunk's, by hand."""
    rig = rigs((0, 1), finish=FinishRule(max_grad_norm=0.5))
    for call in (rig.forward, rig.backward):
        for future in [call(1), call(0)]:
            future.result(10)
    ends = [
        rig.start(lambda slot=slot: rig.clients[slot].finish_step(norm_squared=slot + 1.0))
        for slot in (0, 1)
    ]
    results = [future.result(10) for future in ends]
    mean = (TOKENS[0] * gradient(0) + TOKENS[1] * gradient(1)) / 8.0
    beside = (TOKENS[0] * 1.0 + TOKENS[1] * 2.0) / 8.0
    norm = float(mean.norm() ** 2 + beside) ** 0.5
    assert [r.grad_norm for r in results] == [pytest.approx(norm, rel=1e-5)] * 2
    torch.testing.assert_close(rig.weight(), START - 0.5 * mean * 0.5 / norm, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- once, and the same reply


def test_repeated_calls_wait_with_the_first_and_get_its_reply(rigs):
    rig = rigs((0, 1))
    first = rig.forward(0)
    again = rig.pool.submit(
        lambda: rig.clients[0].forward(hidden(0), last=True, digest=b"f00", timeout=10)
    )
    rig.forward(1).result(10)
    assert first.result(10) is again.result(10)
    sent = [rig.backward(0), rig.backward(1)]
    replies = [future.result(10) for future in sent]
    assert rig.clients[0].backward(grad(0), num_tokens=2.0, digest=b"b00") is replies[0]
    assert [slot.contributions for slot in rig.engine.status().slots] == [1, 1]
    rig.prepare()
    torch.testing.assert_close(rig.weight(), stepped({0: 1, 1: 1}))


def test_call_whose_deadline_passes_says_whom_it_waits_for_and_still_counts(rigs):
    rig = rigs((0, 1))
    with pytest.raises(TrunkUnavailable, match=r"slots \[1\] have not contributed"):
        rig.clients[0].forward(hidden(0), digest=b"f00", timeout=0.05)
    later = rig.forward(1)
    assert torch.equal(later.result(10).tensor, hidden(1) @ START)
    repeated = rig.clients[0].forward(hidden(0), digest=b"f00")
    torch.testing.assert_close(repeated.tensor, hidden(0) @ START)
    assert rig.engine.status().batches.batches == 1


def test_trunk_that_is_started_again_between_forward_and_backward_ends_on_the_same_bits(
    rigs, tmp_path: Path
):
    digests = []
    for killed in (False, True):
        store = CheckpointStore(tmp_path / str(killed))
        if killed:
            first = rigs(checkpoints=store, optimizer=ADAMW, dropout=0.3)
            waiting = [first.forward(slot) for slot in range(3)]
            waiting[0].result(10)
            lost = first.backward(2)
            first.engine.close()
            assert isinstance(lost.exception(10), RoundAborted)
        rig = rigs(checkpoints=store, optimizer=ADAMW, dropout=0.3, attempt=int(killed))
        for call in (rig.forward, rig.backward):
            for future in [call(slot) for slot in ((2, 0, 1) if killed else (0, 1, 2))]:
                future.result(10)
        digests.append(rig.prepare().digest)
    assert digests[0] == digests[1]


def play(rig: Rig, rng: random.Random, most: int) -> bool:
    """Two windows of three clients, each stage in another order; False: it ends after ``most`` calls."""
    calls = 0
    for window, kind in itertools.product((0, 1), ("forward", "backward")):
        futures = []
        for slot in rng.sample(range(3), 3):
            if calls == most:
                return False
            futures.append(getattr(rig, kind)(slot, window))
            calls += 1
        for future in futures:
            future.result(10)
    return True


def test_twenty_kills_at_any_place_end_on_the_bits_of_an_undisturbed_run(rigs, tmp_path: Path):
    rng = random.Random(0)
    settings = {"steps": 2, "optimizer": ADAMW, "dropout": 0.3}
    undisturbed = rigs(**settings)
    assert play(undisturbed, rng, 12)
    store = CheckpointStore(tmp_path)
    places = set()
    for attempt in range(20):
        killed = rigs(checkpoints=store, attempt=attempt, **settings)
        place = rng.randrange(12)
        places.add(place)
        assert not play(killed, rng, place)
        killed.engine.close()
    assert len(places) > 8
    last = rigs(checkpoints=store, attempt=20, **settings)
    assert play(last, rng, 12)
    assert last.prepare().digest == undisturbed.prepare().digest


# ---------------------------------------------------------------------- who is missing


def test_batch_waits_for_everybody_to_join(rigs):
    engine = make_engine(batch_positions=1000)
    engine.begin_round(make_plan((0, 1)))
    early = ToyClient(engine, 0)
    with pytest.raises(TrunkUnavailable, match=r"slots \[1\] have not joined"):
        early.forward(hidden(0), timeout=0.05)
    late = ToyClient(engine, 1)
    late.forward(hidden(1))
    torch.testing.assert_close(early.forward(hidden(0)).tensor, hidden(0) @ START)
    engine.close()


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_client_that_never_comes_is_dropped_at_the_deadline_and_the_others_go_on(rigs, kind):
    clock = ManualClock()
    rig = rigs(quorum=0.5, clock=clock, window_seconds=30.0)
    if kind == "backward":
        for future in [rig.forward(slot) for slot in range(3)]:
            future.result(10)
    # Calls have deadlines of the real clock, which is far behind this one: they never pass here.
    waiting = [getattr(rig, kind)(slot) for slot in (0, 2)]
    assert not any(future.done() for future in waiting)
    clock.now = rig.engine.inspect().deadline
    rig.engine.expire()
    for future in waiting:
        future.result(10)
    assert rig.engine.inspect().deadline == clock.now + (
        30.0 if kind == "forward" else float("inf")
    )
    if kind == "forward":
        for future in [rig.backward(slot) for slot in (0, 2)]:
            future.result(10)
    report = rig.prepare()
    assert [bool(slot.problem) for slot in report.slots] == [False, True, False]
    assert "did not contribute" in report.slots[1].problem
    assert report.batches.partial == (1 if kind == "forward" else 0)
    torch.testing.assert_close(rig.weight(), stepped({0: 1, 2: 1}))


def test_client_that_holds_an_earlier_batch_up_is_late_and_not_those_who_wait_for_it(rigs):
    """Slot 0 sends its second forward and keeps back its first backward."""
    clock = ManualClock()
    rig = rigs(quorum=0.5, clock=clock)
    for future in [rig.forward(slot, last=False) for slot in range(3)]:
        future.result(10)
    ahead = rig.forward(0, 0, 1)
    waiting = [rig.backward(slot, last=False) for slot in (1, 2)]
    clock.now = rig.engine.inspect().deadline
    rig.engine.expire()
    refused(ahead, RefusalReason.DROPPED)
    for future in waiting:
        future.result(10)
    for call in (rig.forward, rig.backward):
        for future in [call(slot, 0, 1) for slot in (1, 2)]:
            future.result(10)
    rig.prepare()
    torch.testing.assert_close(rig.weight(), stepped({1: 2, 2: 2}))


def test_client_that_leaves_between_forward_and_backward_is_not_waited_for(rigs):
    rig = rigs(quorum=0.5)
    for future in [rig.forward(slot) for slot in range(3)]:
        future.result(10)
    waiting = [rig.backward(0), rig.backward(1)]
    rig.clients[2].close()
    for slot, future in zip((0, 1), waiting, strict=True):
        torch.testing.assert_close(future.result(10).tensor, grad(slot) @ START.T)
    report = rig.prepare()
    torch.testing.assert_close(rig.weight(), stepped({0: 1, 1: 1}))
    assert report.batches.sums_again == 0


@pytest.mark.parametrize("how", ["leaves", "revoked"])
def test_client_that_goes_after_its_backward_is_taken_out_of_the_sum(rigs, how):
    rig = rigs(quorum=0.5, dropout=0.0)
    for call in (rig.forward, rig.backward):
        for future in [call(slot, last=False) for slot in range(3)]:
            future.result(10)
    if how == "leaves":
        rig.clients[1].close()
    else:
        rig.engine.revoke([1])
    for call in (rig.forward, rig.backward):
        for future in [call(slot, 0, 1) for slot in (2, 0)]:
            future.result(10)
    report = rig.prepare()
    torch.testing.assert_close(rig.weight(), stepped({0: 2, 2: 2}))
    assert report.batches.sums_again == 1
    assert report.batches.partial == 1


def test_client_that_stops_within_a_step_is_finished_and_the_others_step(rigs):
    rig = rigs((0, 1), steps=2)
    for window in (0, 1):
        for call in (rig.forward, rig.backward):
            for future in [call(slot, window, last=window == 0) for slot in (0, 1)]:
                future.result(10)
    one_step = rig.weight()
    rig.clients[0].shorten_plan(1)
    for call in (rig.forward, rig.backward):
        call(1, 1, 1).result(10)
    report = rig.prepare()
    assert all(slot.completed for slot in report.slots)
    mean = (gradient(1, 1, 0) + gradient(1, 1, 1)) / 2
    torch.testing.assert_close(rig.weight(), one_step - 0.5 * mean)


def test_round_without_quorum_is_given_up_and_whoever_waits_is_told(rigs):
    rig = rigs()
    waiting = [rig.forward(0), rig.forward(1)]
    rig.clients[2].close()
    for future in waiting:
        assert isinstance(future.exception(10), RoundAborted)
    assert torch.equal(rig.weight(), START)


def test_close_tells_whoever_waits(rigs):
    rig = rigs()
    waiting = rig.forward(1)
    rig.engine.close()
    assert isinstance(waiting.exception(10), RoundAborted)


# ---------------------------------------------------------------------- who is at fault


def test_gradient_with_nan_is_refused_at_once_and_the_others_go_on(rigs):
    rig = rigs(quorum=0.5)
    for future in [rig.forward(slot) for slot in range(3)]:
        future.result(10)
    bad = grad(1).clone()
    bad[0, 0, 0] = float("nan")
    assert "slot 1" in str(refused(rig.backward(1, grad=bad), RefusalReason.NON_FINITE))
    waiting = [rig.backward(0), rig.backward(2)]
    rig.clients[1].close()
    for future in waiting:
        future.result(10)
    rig.prepare()
    torch.testing.assert_close(rig.weight(), stepped({0: 1, 2: 1}))


def test_gradient_that_overflows_in_the_joint_backward_is_refused_by_name(rigs):
    rig = rigs(quorum=0.5)
    for future in [rig.forward(slot) for slot in range(3)]:
        future.result(10)
    calls = {slot: rig.backward(slot) for slot in (0, 2)}
    guilty = rig.backward(1, grad=torch.full_like(grad(1), 3e38))
    assert "slot 1" in str(refused(guilty, RefusalReason.NON_FINITE))
    for slot, future in calls.items():
        torch.testing.assert_close(future.result(10).tensor, grad(slot) @ START.T)
    refused(rig.backward(1), RefusalReason.UNKNOWN_CONTRIBUTION)  # its place in the batch is over
    rig.clients[1].close()
    rig.prepare()
    torch.testing.assert_close(rig.weight(), stepped({0: 1, 2: 1}))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"denominator": 1e9}, "loss_denominator"),
        ({"grad": 1e14 * grad(1)}, "largest entry"),
        ({"grad": 100 * grad(1)}, "trunk.outlier-factor"),
    ],
)
def test_client_whose_numbers_may_not_count_is_excluded_and_the_sum_is_the_others(
    rigs, changes, why
):
    rig = rigs(quorum=0.5, reduction=Reduction(outlier_factor=20.0))
    for future in [rig.forward(slot) for slot in range(3)]:
        future.result(10)
    calls = [rig.backward(0), rig.backward(2), rig.backward(1, **changes)]
    for future in calls:
        future.result(10)
    report = rig.prepare()
    assert report.batches.sums_again == 1
    assert why in report.slots[1].problem
    assert [bool(slot.problem) for slot in report.slots] == [False, True, False]
    torch.testing.assert_close(rig.weight(), stepped({0: 1, 2: 1}))


def test_calls_that_contradict_each_other_are_refused(rigs):
    rig = rigs((0, 1))
    for future in [rig.forward(slot) for slot in (0, 1)]:
        future.result(10)
    assert "last" in str(refused(rig.forward(0, 0, 1), RefusalReason.INVALID_REQUEST))
    error = refused(rig.backward(0, last=False), RefusalReason.INVALID_REQUEST)
    assert "its forward said otherwise" in str(error)
    wrong = refused(rig.backward(0, grad=grad(1)), RefusalReason.INVALID_REQUEST)
    assert "shape" in str(wrong)
    refused(rig.backward(0, num_tokens=99.0), RefusalReason.INVALID_REQUEST)
    for future in [rig.backward(slot) for slot in (0, 1)]:  # nothing of that has left a trace
        future.result(10)
    rig.prepare()
    torch.testing.assert_close(rig.weight(), stepped({0: 1, 1: 1}))


# ---------------------------------------------------------------------- memory


def test_graph_that_does_not_fit_is_computed_again_to_the_same_bits(rigs):
    digests, peaks = set(), []
    kept = 3 * sum(hidden(slot).nbytes for slot in range(3))
    for budget in (2**20, kept + 8):
        rig = rigs(dropout=0.5, activation_bytes=budget, activation_bytes_per_client=budget)
        for call in (rig.forward, rig.backward):
            for future in [call(slot) for slot in range(3)]:
                future.result(10)
        report = rig.prepare()
        digests.add(report.digest)
        peaks.append(report.activations)
    assert len(digests) == 1
    assert [kept.recomputes > 0 for kept in peaks] == [False, True]
    assert all(kept.peak_bytes <= kept.budget_bytes for kept in peaks)
    assert peaks[1].num_bytes == 0  # the window has stepped


def test_forward_over_the_budget_is_refused_before_it_waits(rigs):
    rig = rigs((0, 1), activation_bytes=2**20, activation_bytes_per_client=3 * hidden(0).nbytes)
    rig.forward(0, last=False)
    refused(rig.forward(0, 0, 1), RefusalReason.OVER_BUDGET)


# ---------------------------------------------------------------------- what it is not for


def test_reduction_that_needs_each_gradient_is_refused():
    for reduction in (Reduction(max_client_norm=1.0), Reduction(rules=parse_rules("median"))):
        with pytest.raises(ConfigError, match=r"trunk\.window-batches"):
            make_engine(batch_positions=1000, reduction=reduction)


def test_round_that_steps_once_computes_each_alone(rigs, caplog):
    caplog.set_level("INFO")
    rig = rigs((0, 1), step_every=StepEvery.SERVER_ROUND)
    assert "every micro-batch is computed alone" in caplog.text
    for slot in (0, 1):
        rig.forward(slot).result(10)
        rig.backward(slot).result(10)
    rig.prepare()
    torch.testing.assert_close(rig.weight(), stepped({0: 1, 1: 1}))
