"""Asynchronous rounds on the trunk: versions, staleness, exactly-once, budget, abort."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flower_split.config import OptimizerConfig
from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import Arrival, Dispatch, ForwardMode, RoundBase, RoundPlan
from flower_split.trunk.compute.gradients import Reduction
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.engine_rig import ManualClock
from tests.support.toy_trunk import HIDDEN, ToyClient, ToyTrunk, make_engine, make_plan

RATE = 0.5  # of the toy's SGD


def hidden(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, HIDDEN, generator=generator)


def gradient_at(weight: Tensor, smashed: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """``(smashed_grad, weight gradient)`` of ``h @ W`` by hand."""
    return grad @ weight.T, (smashed[0].T @ grad[0])


class Coordinator:
    """Begins, prepares and commits asynchronous rounds, as the strategy does."""

    def __init__(self, engine: TrunkEngine) -> None:
        self.engine = engine
        self.sent: list[Dispatch] = []
        self.server_round = 1

    def plan(self, attempt: int = 0) -> RoundPlan:
        return make_plan(
            (),
            server_round=self.server_round,
            attempt=attempt,
            step_every=StepEvery.BUFFER,
            dispatches=tuple(self.sent),
            num_server_rounds=9,
        )

    def send(self, *numbers_and_slots: tuple[int, int]) -> None:
        self.sent += [Dispatch(n, slot, f"token-{n}") for n, slot in numbers_and_slots]
        self.engine.begin_round(self.plan())

    def close(self, *arrivals: tuple[int, float], commit: bool = True):
        report = self.engine.prepare_round(
            "test",
            self.server_round,
            0,
            time.monotonic() + 20,
            [Arrival(n, factor) for n, factor in arrivals],
        )
        if commit:
            self.engine.commit_round("test", self.server_round, 0)
            self.server_round += 1
            done = {n for n, _ in arrivals}
            self.sent = [entry for entry in self.sent if entry.number not in done]
        return report


@pytest.fixture
def engine() -> Iterator[TrunkEngine]:
    engine = make_engine()
    yield engine
    engine.close()


def weight_of(engine: TrunkEngine) -> Tensor:
    return engine.adapter()["weight"]


def work(client: ToyClient, seed: int, tokens: float = 1.0, **last: bool) -> tuple[Tensor, Tensor]:
    """One micro-batch; returns what was sent."""
    smashed, grad = hidden(seed), hidden(seed + 1000)
    client.forward(smashed, digest=str(seed).encode())
    client.backward(grad, num_tokens=tokens, digest=str(seed).encode(), **last)
    return smashed, grad


def test_flight_computes_with_its_own_version_while_the_trunk_steps(engine: TrunkEngine) -> None:
    coordinator = Coordinator(engine)
    coordinator.send((1, 0), (2, 1))
    slow, fast = ToyClient(engine, 1), ToyClient(engine, 2)
    first = weight_of(engine)
    smashed, grad = hidden(1), hidden(2)
    early = slow.forward(smashed).tensor  # the forward at version 0 ...
    given = work(fast, 7)
    coordinator.close((2, 1.0))
    second = first - RATE * gradient_at(first, *given)[1]
    assert torch.allclose(weight_of(engine), second, atol=1e-6)
    assert not torch.allclose(first, second, atol=1e-3)
    back = slow.backward(grad, last=False)  # ... its backward after the step
    assert back.version == 0 and engine.status().version == 1
    assert torch.allclose(early, smashed @ first, atol=1e-6)
    assert torch.allclose(back.tensor, grad @ first.T, atol=1e-6)
    coordinator.send((3, 1))
    other = ToyClient(engine, 3)
    assert other.grant.version == 1 and slow.grant.version == 0
    # Both go on at once, each at its own version.
    assert torch.allclose(
        slow.forward(smashed, micro_batch=1, digest=b"f1").tensor, smashed @ first, atol=1e-6
    )
    assert torch.allclose(other.forward(smashed).tensor, smashed @ second, atol=1e-6)
    assert torch.allclose(
        slow.backward(grad, micro_batch=1, digest=b"b1").tensor, grad @ first.T, atol=1e-6
    )
    assert torch.allclose(other.backward(grad).tensor, grad @ second.T, atol=1e-6)


def test_buffer_steps_by_hand_computed_staleness(engine: TrunkEngine) -> None:
    coordinator = Coordinator(engine)
    coordinator.send((1, 0), (2, 1))
    stale, first_done = ToyClient(engine, 1), ToyClient(engine, 2)
    start = weight_of(engine)
    a = work(first_done, 3, tokens=2.0)
    coordinator.close((2, 1.0))
    middle = start - RATE * gradient_at(start, *a)[1]
    coordinator.send((3, 1))
    fresh = ToyClient(engine, 3)
    b, c = work(stale, 5, tokens=3.0), work(fresh, 9, tokens=1.0)
    report = coordinator.close((1, 0.25), (3, 1.0))
    # (s n g + s' n' g') / (n + n'), with the losses being means over the clients' own tokens
    step = (0.25 * 3.0 * gradient_at(start, *b)[1] + 1.0 * gradient_at(middle, *c)[1]) / 4.0
    assert torch.allclose(weight_of(engine), middle - RATE * step, atol=1e-6)
    assert report.version == 2 and report.optimizer_steps == 1
    given = [(item.slot, item.completed, item.num_tokens) for item in report.slots]
    assert given == [(0, True, 3.0), (1, True, 1.0)]


def test_buffer_without_staleness_is_a_window_of_a_server_round_bit_for_bit() -> None:
    adam = OptimizerConfig(name="adamw", learning_rate=0.05)
    reduction = Reduction(max_client_norm=0.7)
    weights = []
    for asynchronous in (False, True):
        engine = make_engine(optimizer=adam, reduction=reduction)
        coordinator = Coordinator(engine)
        for server_round in (1, 2):
            numbers = [10 * server_round + slot for slot in (0, 1, 2)]
            if asynchronous:
                coordinator.send(*((n, n % 10) for n in numbers))
                clients = {n % 10: ToyClient(engine, n) for n in numbers}
            else:
                plan = make_plan(
                    (0, 1, 2),
                    server_round=server_round,
                    step_every=StepEvery.SERVER_ROUND,
                    num_server_rounds=9,
                )
                engine.begin_round(plan)
                clients = {slot: ToyClient(engine, slot) for slot in (0, 1, 2)}
            for slot in (2, 0, 1) if asynchronous else (0, 1, 2):
                work(clients[slot], 100 * server_round + slot, tokens=slot + 1.0)
            if asynchronous:
                coordinator.close(*((n, 1.0) for n in reversed(numbers)))
            else:
                engine.prepare_round("test", server_round, 0, time.monotonic() + 20)
                engine.commit_round("test", server_round, 0)
        weights.append(weight_of(engine))
        engine.close()
    assert torch.equal(*weights)


def test_arrival_far_above_the_others_gives_the_round_up_and_is_named() -> None:
    engine = make_engine(reduction=Reduction(outlier_factor=20.0))
    try:
        before = weight_of(engine)
        coordinator = Coordinator(engine)
        coordinator.send((1, 0), (2, 1), (3, 2))
        clients = [ToyClient(engine, number) for number in (1, 2, 3)]
        work(clients[0], 1)
        work(clients[2], 3)
        clients[1].forward(hidden(2))
        clients[1].backward(1e4 * hidden(1002))
        with pytest.raises(RoundAborted, match="slot 1: .*trunk.outlier-factor"):
            coordinator.close((1, 1.0), (2, 1.0), (3, 1.0))
        assert torch.equal(weight_of(engine), before)
    finally:
        engine.close()


def test_arrival_order_does_not_change_a_bit() -> None:
    results = []
    for order in ((1, 2, 3), (3, 1, 2)):
        engine = make_engine()
        coordinator = Coordinator(engine)
        coordinator.send((1, 2), (2, 0), (3, 1))
        clients = {n: ToyClient(engine, n) for n in (1, 2, 3)}
        for n in order:
            work(clients[n], n, tokens=n)
        coordinator.close(*((n, 1 / n) for n in order))
        results.append(weight_of(engine))
        engine.close()
    assert torch.equal(*results)


def test_repeated_calls_count_once(engine: TrunkEngine) -> None:
    coordinator = Coordinator(engine)
    coordinator.send((1, 0))
    client, start = ToyClient(engine, 1), weight_of(engine)
    smashed, grad = hidden(1), hidden(2)
    one, two = client.forward(smashed), client.forward(smashed)
    assert one is two
    one, two = client.backward(grad), client.backward(grad)
    assert one is two
    with pytest.raises(TrunkRefused, match="other content") as refused:
        client.backward(grad, digest=b"other")
    assert refused.value.reason is RefusalReason.DIGEST_MISMATCH
    report = coordinator.close((1, 1.0), commit=False)
    assert coordinator.close((1, 1.0)) is report  # the coordinator's retry
    assert torch.allclose(
        weight_of(engine), start - RATE * gradient_at(start, smashed, grad)[1], atol=1e-6
    )


def test_arrival_of_a_former_buffer_is_refused(engine: TrunkEngine) -> None:
    coordinator = Coordinator(engine)
    coordinator.send((1, 0), (2, 1))
    clients = ToyClient(engine, 1), ToyClient(engine, 2)
    for seed, client in enumerate(clients):
        work(client, seed)
    coordinator.close((1, 1.0))
    coordinator.send()
    before = weight_of(engine)
    with pytest.raises(TrunkRefused, match="dispatch 1 has arrived, but it is not at work"):
        coordinator.close((1, 1.0), (2, 1.0))
    assert torch.equal(weight_of(engine), before)
    coordinator.close((2, 1.0))  # which the refusal has not used up
    with pytest.raises(TrunkRefused):
        ToyClient(engine, 1)  # its token is worth nothing any more


def test_arrival_that_is_not_done_is_refused(engine: TrunkEngine) -> None:
    coordinator = Coordinator(engine)
    coordinator.send((1, 4))
    client = ToyClient(engine, 1, steps=2)
    work(client, 1, last=False)
    with pytest.raises(TrunkRefused, match=r"is not done: slots \[4\] have not contributed"):
        coordinator.close((1, 1.0))


def test_dispatch_that_is_not_named_any_more_is_recalled(engine: TrunkEngine) -> None:
    coordinator = Coordinator(engine)
    coordinator.send((1, 0), (2, 1))
    client = ToyClient(engine, 1)
    client.forward(hidden(1))
    coordinator.sent = [entry for entry in coordinator.sent if entry.number == 2]
    coordinator.send((3, 0))
    with pytest.raises(TrunkRefused):
        client.backward(hidden(2))
    assert ToyClient(engine, 3).grant.slot == 0
    assert engine.status().activations.num_bytes == 0


def test_slot_at_work_is_not_sent_out_twice(engine: TrunkEngine) -> None:
    coordinator = Coordinator(engine)
    coordinator.send((1, 0))
    with pytest.raises(TrunkRefused, match="twice at a time"):
        coordinator.send((2, 0))


def test_client_that_leaves_early_is_recalled_and_the_others_go_on(engine: TrunkEngine) -> None:
    coordinator = Coordinator(engine)
    coordinator.send((1, 0), (2, 1))
    leaver, stays = ToyClient(engine, 1), ToyClient(engine, 2)
    leaver.forward(hidden(1))
    leaver.close()
    with pytest.raises(RoundAborted, match="closed its session early"):
        leaver.backward(hidden(2))
    work(stays, 5)
    coordinator.close((2, 1.0))
    with pytest.raises(TrunkRefused, match="closed its session early"):
        coordinator.send()
        coordinator.close((1, 1.0))


def test_silent_dispatch_loses_its_lease() -> None:
    clock = ManualClock()
    engine = make_engine(clock=clock)
    coordinator = Coordinator(engine)
    coordinator.send((1, 0), (2, 1))
    silent = ToyClient(engine, 1)
    silent.forward(hidden(1), timeout=1e9)
    clock.now += 31.0
    engine.expire()
    with pytest.raises(RoundAborted, match="lease ended"):
        silent.backward(hidden(2), version=0)
    engine.close()


def test_abort_goes_back_and_recalls_everybody(engine: TrunkEngine) -> None:
    coordinator = Coordinator(engine)
    coordinator.send((1, 0), (2, 1))
    one, two = ToyClient(engine, 1), ToyClient(engine, 2)
    before = weight_of(engine)
    work(one, 1)
    coordinator.close((1, 1.0), commit=False)
    assert not torch.equal(weight_of(engine), before)
    engine.abort_round("test", 1, 0, "the ServerApp could not write")
    assert torch.equal(weight_of(engine), before)
    with pytest.raises(RoundAborted, match="could not write"):
        two.forward(hidden(2))
    assert engine.inspect().weight_versions.held == []


def test_evaluation_between_buffers_leaves_those_at_work_alone(engine: TrunkEngine) -> None:
    coordinator = Coordinator(engine)
    coordinator.send((1, 0), (2, 1))
    slow, fast = ToyClient(engine, 1), ToyClient(engine, 2)
    first, smashed = weight_of(engine), hidden(1)
    slow.forward(smashed)
    work(fast, 5)
    coordinator.close((2, 1.0))
    engine.begin_round(make_plan((0, 1), server_round=1, evaluate=True))
    judge = ToyClient(engine, 0, evaluate=True)
    seen = judge.forward(smashed, mode=ForwardMode.EVALUATE).tensor
    assert torch.allclose(seen, smashed @ weight_of(engine), atol=1e-6)
    assert torch.allclose(slow.backward(hidden(2)).tensor, hidden(2) @ first.T, atol=1e-6)
    engine.abort_round("test", 1, 0, "the evaluation ended")
    coordinator.send((3, 1))
    report = coordinator.close((1, 0.5))
    assert report.optimizer_steps == 1


def test_weights_of_versions_nobody_works_on_are_freed(engine: TrunkEngine) -> None:
    coordinator, versions = Coordinator(engine), engine.inspect().weight_versions
    coordinator.send((1, 0), (2, 1))
    slow, fast = ToyClient(engine, 1), ToyClient(engine, 2)
    work(fast, 5)
    coordinator.close((2, 1.0))
    coordinator.send((3, 1))
    assert versions.held == [0, 1]
    assert versions.num_bytes == 2 * 4 * HIDDEN * HIDDEN
    work(slow, 6)
    assert versions.held == [1]
    coordinator.close((1, 1.0))
    assert versions.held == [1]


def test_weights_beyond_their_budget_are_refused_by_name() -> None:
    engine = make_engine(weight_bytes=4 * HIDDEN * HIDDEN)
    coordinator = Coordinator(engine)
    coordinator.send((1, 0), (2, 1))
    work(ToyClient(engine, 2), 5)
    coordinator.close((2, 1.0))
    with pytest.raises(TrunkRefused, match="trunk.snapshot-memory") as refused:
        coordinator.send((3, 1))
    assert refused.value.reason is RefusalReason.OVER_BUDGET
    engine.close()


def test_restarted_trunk_goes_on_from_the_committed_buffer(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    engine = make_engine(checkpoints=store)
    coordinator = Coordinator(engine)
    coordinator.send((1, 0), (2, 1))
    work(ToyClient(engine, 1), 1)
    report = coordinator.close((1, 1.0))
    committed = weight_of(engine)
    work(ToyClient(engine, 2), 2)
    coordinator.send()
    coordinator.close((2, 1.0), commit=False)  # prepared, and then it dies
    engine.close()
    again = make_engine(checkpoints=store)
    other = Coordinator(again)
    other.server_round = 2
    other.sent = [Dispatch(2, 1, "another token")]
    plan = replace(other.plan(attempt=1), base=RoundBase(1, report.digest))
    again.begin_round(plan)
    assert torch.equal(weight_of(again), committed)
    again.close()


@pytest.mark.parametrize("activation_bytes", [2**20, 120])
def test_recomputed_forwards_use_the_version_of_their_dispatch(activation_bytes: int) -> None:
    engine = make_engine(activation_bytes=activation_bytes, dropout=0.5)
    coordinator = Coordinator(engine)
    coordinator.send((1, 0), (2, 1))
    slow, fast = ToyClient(engine, 1), ToyClient(engine, 2)
    work(fast, 5)
    first, smashed = weight_of(engine), hidden(1)
    output = slow.forward(smashed).tensor
    coordinator.close((2, 1.0))
    smashed_grad = slow.backward(hidden(2)).tensor
    mask = smashed_grad / (hidden(2) @ first.T)  # dropout's, by the gradient: 0 or 2
    assert set(mask.round(decimals=4).flatten().tolist()) <= {0.0, 2.0}
    assert torch.allclose((smashed * mask.round(decimals=4)) @ first, output, atol=1e-5)
    assert (engine.status().activations.recomputes > 0) == (activation_bytes == 120)
    engine.close()


def test_frozen_trunk_lets_a_client_go_on_while_its_former_work_is_taken() -> None:
    engine = make_engine(mode="frozen")
    coordinator = Coordinator(engine)
    coordinator.send((1, 0))
    first = ToyClient(engine, 1)
    first.forward(hidden(9), micro_batch=1, digest=b"left behind")
    first.forward(hidden(1))
    first.backward(hidden(2))
    first.close()
    coordinator.send((2, 0))  # its reply has come: it is sent out again, in the same round
    second = ToyClient(engine, 2)
    assert engine.status().activations.num_bytes == 0  # what it left behind is gone
    second.forward(hidden(3))
    coordinator.close((1, 1.0))
    grad = hidden(4)
    expected = grad @ ToyTrunk().weight.detach().T
    assert torch.allclose(second.backward(grad).tensor, expected, atol=1e-6)
    engine.close()


def test_frozen_trunk_serves_dispatches_without_a_step() -> None:
    engine = make_engine(mode="frozen")
    coordinator = Coordinator(engine)
    coordinator.send((1, 0))
    client = ToyClient(engine, 1)
    client.forward(hidden(1))
    client.backward(hidden(2))
    client.close()
    report = coordinator.close((1, 0.5))
    assert report.optimizer_steps == 0
    assert torch.equal(ToyTrunk().weight.detach(), engine.compute.trunk.weight)
    engine.close()
