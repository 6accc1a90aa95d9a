"""The engine's promises, on a trunk whose gradients are worked out by hand."""

import threading
import time

import pytest
import torch

from flower_split.config import OptimizerConfig
from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused, TrunkUnavailable
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import ForwardMode
from tests.support.toy_trunk import HIDDEN, ToyClient, ToyTrunk, make_engine, make_plan


@pytest.fixture
def engine():
    engine = make_engine()
    yield engine
    engine.close()


def batch(seed: int, rows: int = 2, sequence: int = 4) -> torch.Tensor:
    return torch.randn(rows, sequence, HIDDEN, generator=torch.Generator().manual_seed(seed))


def weight_gradient(hidden: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """dL/dW of ``h @ W``, by hand."""
    return hidden.reshape(-1, HIDDEN).T @ grad.reshape(-1, HIDDEN)


def refusal(reason: RefusalReason):
    """Expect a refusal with this reason."""

    class Expect:
        def __enter__(self):
            self.raises = pytest.raises(TrunkRefused)
            self.info = self.raises.__enter__()
            return self.info

        def __exit__(self, *exception):
            result = self.raises.__exit__(*exception)
            assert self.info.value.reason is reason, self.info.value
            return result

    return Expect()


def contribute(client: ToyClient, seed: int, window: int = 0, *, num_tokens: float = 1.0) -> None:
    client.forward(batch(seed), window)
    client.backward(batch(seed + 100), window, num_tokens=num_tokens)


def test_step_two_clients_unequal_tokens_is_the_token_weighted_mean(engine):
    engine.begin_round(make_plan())
    clients = [ToyClient(engine, slot) for slot in (0, 1)]
    start = ToyTrunk().weight.detach()
    tokens = {0: 2.0, 1: 6.0}
    expected = sum(
        tokens[slot] / 8.0 * weight_gradient(batch(slot), batch(slot + 100)) for slot in (0, 1)
    )
    unweighted = sum(0.5 * weight_gradient(batch(slot), batch(slot + 100)) for slot in (0, 1))
    for slot in (1, 0):
        result = clients[slot].forward(batch(slot))
        assert torch.equal(result.tensor, batch(slot) @ start)
        smashed_grad = clients[slot].backward(batch(slot + 100), num_tokens=tokens[slot]).tensor
        assert torch.equal(smashed_grad, batch(slot + 100) @ start.T)
    engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    trained = engine.adapter()["weight"]
    torch.testing.assert_close(trained, start - 0.5 * expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(trained, start - 0.5 * unweighted, rtol=1e-3)


def test_step_one_client_gradient_is_bit_identical_to_autograd(engine):
    engine.begin_round(make_plan((0,)))
    client = ToyClient(engine, 0)
    reference = ToyTrunk()
    hidden = batch(1).requires_grad_()
    reference(hidden).backward(batch(2))
    torch.optim.SGD(reference.parameters(), lr=0.5).step()
    client.forward(batch(1))
    smashed_grad = client.backward(batch(2), num_tokens=7.0).tensor
    engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    assert torch.equal(smashed_grad, hidden.grad)
    assert torch.equal(engine.adapter()["weight"], reference.weight.detach())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_micro_batches_any_order_add_as_loss_backward_would(engine, order):
    engine.begin_round(make_plan((0,)))
    client = ToyClient(engine, 0)
    reference = ToyTrunk()
    for index in range(3):
        reference(batch(index)).backward(batch(index + 100))
    torch.optim.SGD(reference.parameters(), lr=0.5).step()
    for index in order:
        client.forward(batch(index), 0, index, digest=bytes([index]))
    for index in order:
        client.backward(
            batch(index + 100),
            0,
            index,
            num_tokens=2.0,
            denominator=6.0,
            last=index == 2,
            digest=bytes([index]),
        )
    engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    assert torch.equal(engine.adapter()["weight"], reference.weight.detach())


def test_final_weights_any_arrival_order_are_bit_identical():
    digests = set()
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        engine = make_engine(optimizer=OptimizerConfig(name="adamw"))
        engine.begin_round(make_plan((0, 1, 2)))
        clients = [ToyClient(engine, slot, 2) for slot in range(3)]
        for window in range(2):
            for slot in order:
                contribute(clients[slot], slot + 10 * window, window, num_tokens=slot + 1.0)
        digests.add(engine.prepare_round("test", 1, 0, time.monotonic() + 5).digest)
        engine.close()
    assert len(digests) == 1


def test_forward_of_next_window_waits_for_the_step(engine):
    engine.begin_round(make_plan())
    fast, slow = (ToyClient(engine, slot, 2) for slot in (0, 1))
    contribute(fast, 0)
    versions = []
    ahead = threading.Thread(target=lambda: versions.append(fast.forward(batch(5), 1).version))
    ahead.start()
    contribute(slow, 1)
    ahead.join(timeout=10)
    assert versions == [1]


def test_forward_of_next_window_past_its_deadline_says_whom_it_waits_for(engine):
    engine.begin_round(make_plan())
    fast, _ = (ToyClient(engine, slot, 2) for slot in (0, 1))
    contribute(fast, 0)
    with pytest.raises(TrunkUnavailable, match=r"version 1 .*slots \[1\] have not contributed"):
        fast.forward(batch(5), 1, timeout=0.05)


def test_repeated_calls_have_one_effect_and_the_same_reply(engine):
    engine.begin_round(make_plan((0,)))
    client = ToyClient(engine, 0)
    first = client.forward(batch(0))
    assert client.forward(batch(0)) is first
    once = client.backward(batch(100))
    assert client.backward(batch(100)) is once
    assert client.forward(batch(0)) is first  # also after its step
    engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    assert engine.status().slots[0].contributions == 1
    assert engine.status().version == 1


def test_repeated_key_with_other_content_is_refused(engine):
    engine.begin_round(make_plan((0,)))
    client = ToyClient(engine, 0)
    client.forward(batch(0), digest=b"one")
    with refusal(RefusalReason.DIGEST_MISMATCH):
        client.forward(batch(1), digest=b"two")


@pytest.mark.parametrize("kind", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_backward_after_the_weights_moved_is_refused(name, kind):
    """Fused steps do not raise autograd's own version counter: the guard must not depend on it."""
    engine = make_engine(mode="joint")
    compute = engine.compute
    engine.begin_round(make_plan((0,), step_every=StepEvery.SERVER_ROUND))
    options = {} if kind == "plain" else {kind: True}
    compute._optimizer = getattr(torch.optim, name)(compute.parameters, lr=0.1, **options)
    client = ToyClient(engine, 0)
    client.forward(batch(0))
    before = engine.adapter()["weight"]
    compute.step([torch.ones(HIDDEN, HIDDEN)])  # what must never happen under a graph
    moved = engine.adapter()["weight"]
    assert not torch.equal(before, moved)
    for version in (None, compute.version):  # the honest client, and one that says what suits it
        with refusal(RefusalReason.STALE_VERSION):
            client.backward(batch(100), version=version)
    assert engine.status().slots[0].contributions == 0
    assert torch.equal(engine.adapter()["weight"], moved)
    engine.close()


def test_backward_without_forward_is_refused(engine):
    engine.begin_round(make_plan((0,)))
    with refusal(RefusalReason.UNKNOWN_CONTRIBUTION):
        ToyClient(engine, 0).backward(batch(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_tensors_are_refused_and_leave_no_trace(engine, value):
    engine.begin_round(make_plan((0,)))
    client = ToyClient(engine, 0)
    bad = batch(0)
    bad[0, 0, 0] = value
    with refusal(RefusalReason.NON_FINITE):
        client.forward(bad)
    client.forward(batch(0))
    with refusal(RefusalReason.NON_FINITE):
        client.backward(bad)
    assert engine.status().slots[0].contributions == 0
    client.backward(batch(100))
    assert engine.prepare_round("test", 1, 0, time.monotonic() + 5).optimizer_steps == 1


def test_backward_is_tried_again_after_one_whose_gradients_were_not_finite(engine):
    engine.begin_round(make_plan((0,)))
    client = ToyClient(engine, 0)
    large = torch.full_like(batch(0), 1e20)
    client.forward(large)
    with refusal(RefusalReason.NON_FINITE):
        client.backward(large, digest=b"1")  # h^T g is 1e40, beyond fp32
    small = client.backward(torch.ones_like(large), digest=b"2")  # the graph was used up
    weight = engine.compute.parameters[0].detach()
    torch.testing.assert_close(small.tensor, torch.ones_like(large) @ weight.T)


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"hidden_states": torch.zeros(2, 4, HIDDEN + 1)}, "hidden_states"),
        ({"hidden_states": torch.zeros(2, 4)}, "hidden_states"),
        ({"hidden_states": torch.zeros(2, 4, HIDDEN, dtype=torch.int64)}, "floating"),
        ({"hidden_states": torch.zeros(0, 4, HIDDEN)}, "empty"),
        (
            {"hidden_states": batch(0), "attention_mask": torch.ones(2, 5)},
            "attention_mask of shape",
        ),
        ({"hidden_states": batch(0), "labels": torch.ones(2, 4)}, "labels of shape"),
    ],
)
def test_forward_with_misfitting_tensors_is_refused(engine, tensors, what):
    engine.begin_round(make_plan((0,)))
    client = ToyClient(engine, 0)
    hidden = tensors.pop("hidden_states")
    with refusal(RefusalReason.INVALID_REQUEST) as info:
        client.forward(hidden, **tensors)
    assert what in str(info.value)


@pytest.mark.parametrize(
    "weights",
    [
        {"num_tokens": 0.0},
        {"num_tokens": -1.0},
        {"num_tokens": float("nan")},
        {"num_tokens": 9.0},
        {"num_tokens": 1.0, "denominator": 0.0},
        {"num_tokens": 1.0, "denominator": float("inf")},
    ],
)
def test_backward_with_impossible_weights_is_refused(engine, weights):
    engine.begin_round(make_plan((0,)))
    client = ToyClient(engine, 0)
    client.forward(batch(0))
    with refusal(RefusalReason.INVALID_REQUEST):
        client.backward(batch(1), **weights)


def test_session_with_unknown_token_or_other_model_is_refused(engine):
    with refusal(RefusalReason.NO_ROUND):
        engine.open_session("token-0", {"model": "toy"}, 1, False)
    engine.begin_round(make_plan((0,)))
    with refusal(RefusalReason.UNAUTHENTICATED):
        engine.open_session("token-7", {"model": "toy"}, 1, False)
    with refusal(RefusalReason.FINGERPRINT_MISMATCH) as info:
        engine.open_session("token-0", {"model": "other"}, 1, False)
    assert "model (trunk: toy, client: other)" in str(info.value)


def test_session_of_another_epoch_is_refused(engine):
    engine.begin_round(make_plan((0,)))
    client = ToyClient(engine, 0)
    with refusal(RefusalReason.WRONG_EPOCH):
        engine.wait_version(client.grant.session, client.grant.epoch + 1, 0, time.monotonic())


def test_window_past_its_deadline_without_quorum_aborts_and_rolls_back(engine):
    engine.begin_round(make_plan(window_seconds=0.2))
    fast, slow = (ToyClient(engine, slot, 2) for slot in (0, 1))
    before = engine.adapter()["weight"]
    contribute(fast, 0)
    contribute(slow, 1)
    with pytest.raises(RoundAborted, match=r"slot 1: it did not contribute to window 1"):
        contribute(fast, 2, 1)
        engine.wait_version(fast.grant.session, fast.grant.epoch, 2, time.monotonic() + 10)
    assert torch.equal(engine.adapter()["weight"], before)
    assert engine.status().version == 0
    assert engine.status().phase == "aborted"


def test_window_past_its_deadline_with_quorum_goes_on_without_the_late(engine):
    engine.begin_round(make_plan((0, 1, 2), window_seconds=0.2, quorum=0.5))
    clients = [ToyClient(engine, slot, 1) for slot in range(3)]
    for slot in (0, 2):
        contribute(clients[slot], slot)
    clients[1].forward(batch(1))
    engine.wait_version(clients[0].grant.session, clients[0].grant.epoch, 1, time.monotonic() + 10)
    with refusal(RefusalReason.DROPPED):
        clients[1].backward(batch(101))
    report = engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    assert [slot.completed for slot in report.slots] == [True, False, True]
    expected = 0.5 * sum(weight_gradient(batch(s), batch(s + 100)) for s in (0, 2))
    torch.testing.assert_close(
        engine.adapter()["weight"], ToyTrunk().weight.detach() - 0.5 * expected
    )


def test_participant_that_never_joins_aborts_the_round_by_name(engine):
    engine.begin_round(make_plan(join_seconds=0.1))
    client = ToyClient(engine, 0)
    contribute(client, 0)
    with pytest.raises(RoundAborted, match="slot 1: it did not join"):
        engine.wait_version(client.grant.session, client.grant.epoch, 1, time.monotonic() + 10)


def test_client_that_leaves_early_aborts_at_once(engine):
    engine.begin_round(make_plan())
    staying, leaving = (ToyClient(engine, slot, 2) for slot in (0, 1))
    leaving.close()
    with pytest.raises(RoundAborted, match="slot 1: it closed its session early"):
        staying.forward(batch(0))


def test_abort_restores_weights_and_optimizer_for_the_next_attempt():
    digests = []
    for aborts in (0, 2):
        engine = make_engine(optimizer=OptimizerConfig(name="adamw"))
        for attempt in range(aborts + 1):
            engine.begin_round(make_plan((0,), attempt=attempt))
            client = ToyClient(engine, 0, 2)
            contribute(client, 0)
            if attempt < aborts:
                engine.abort_round("test", 1, attempt, "the test says so")
        contribute(client, 1, 1)
        digests.append(engine.prepare_round("test", 1, aborts, time.monotonic() + 5).digest)
        engine.close()
    assert digests[0] == digests[1]


def test_calls_of_a_dead_attempt_are_refused(engine):
    engine.begin_round(make_plan((0,)))
    zombie = ToyClient(engine, 0)
    engine.begin_round(make_plan((0,), attempt=1))
    with refusal(RefusalReason.UNKNOWN_SESSION):
        zombie.forward(batch(0))


def test_server_round_clients_one_after_the_other_make_one_step(engine):
    plan = make_plan(step_every=StepEvery.SERVER_ROUND)
    engine.begin_round(plan)
    expected = torch.zeros(HIDDEN, HIDDEN)
    for slot in (0, 1):
        client = ToyClient(engine, slot, 3)
        for index in range(3):
            seed = 10 * slot + index
            client.forward(batch(seed), 0, index, digest=bytes([index]))
            client.backward(batch(seed + 100), 0, index, last=index == 2, digest=bytes([index]))
            expected += weight_gradient(batch(seed), batch(seed + 100)) / 6
        client.close()
    report = engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    assert report.optimizer_steps == 1
    torch.testing.assert_close(
        engine.adapter()["weight"], ToyTrunk().weight.detach() - 0.5 * expected
    )


def test_contribution_mode_steps_after_every_backward(engine):
    engine.begin_round(make_plan(step_every=StepEvery.CONTRIBUTION))
    reference = ToyTrunk()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    clients = [ToyClient(engine, slot) for slot in (0, 1)]
    for slot in (1, 0):
        optimizer.zero_grad()
        reference(batch(slot)).backward(batch(slot + 100))
        optimizer.step()
        version = clients[slot].forward(batch(slot)).version
        clients[slot].backward(batch(slot + 100), version=version)
    report = engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    assert report.optimizer_steps == 2
    assert torch.equal(engine.adapter()["weight"], reference.weight.detach())


def test_contribution_mode_steps_after_every_micro_batch(engine):
    engine.begin_round(make_plan((0,), step_every=StepEvery.CONTRIBUTION))
    reference = ToyTrunk()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    client = ToyClient(engine, 0)
    for index in range(2):
        optimizer.zero_grad()
        reference(batch(index)).backward(batch(index + 100))
        optimizer.step()
        digest = bytes([index])
        version = client.forward(batch(index), 0, index, digest=digest).version
        client.backward(
            batch(index + 100), 0, index, last=index == 1, version=version, digest=digest
        )
    assert engine.prepare_round("test", 1, 0, time.monotonic() + 5).optimizer_steps == 2
    assert torch.equal(engine.adapter()["weight"], reference.weight.detach())


def test_contribution_mode_forward_waits_for_the_others_backward(engine):
    engine.begin_round(make_plan(step_every=StepEvery.CONTRIBUTION))
    first, second = (ToyClient(engine, slot) for slot in (0, 1))
    first.forward(batch(0))
    with pytest.raises(TrunkUnavailable, match="its turn"):
        second.forward(batch(1), timeout=0.05)
    first.backward(batch(100))
    assert second.forward(batch(1)).version == 1


def test_frozen_trunk_returns_gradients_and_never_changes():
    engine = make_engine(mode="frozen")
    engine.begin_round(make_plan(quorum=0.5))
    client = ToyClient(engine, 0, 2)
    client.forward(batch(0))
    smashed_grad = client.backward(batch(100)).tensor
    assert torch.equal(smashed_grad, batch(100) @ ToyTrunk().weight.detach().T)
    client.close()
    report = engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    assert report.version == 0
    assert [slot.completed for slot in report.slots] == [True, False]
    engine.close()


def test_forward_only_refuses_what_keeps_a_graph():
    engine = make_engine(mode="forward-only")
    engine.begin_round(make_plan((0,)))
    client = ToyClient(engine, 0)
    result = client.forward(batch(0), mode=ForwardMode.NO_GRAD)
    assert not result.tensor.requires_grad
    with refusal(RefusalReason.INVALID_REQUEST):
        client.forward(batch(0))
    engine.close()


def test_dropout_repeats_for_a_key_and_differs_between_keys():
    engine = make_engine(dropout=0.5)
    outputs = {}
    for attempt in (0, 1):
        engine.begin_round(make_plan((0,), attempt=attempt))
        client = ToyClient(engine, 0)
        for index in (0, 1):
            outputs[attempt, index] = client.forward(
                batch(0), 0, index, digest=bytes([index])
            ).tensor
    assert torch.equal(outputs[0, 0], outputs[1, 0])
    assert not torch.equal(outputs[0, 0], outputs[0, 1])
    engine.close()


def test_recompute_past_the_budget_gives_the_same_bits_with_dropout():
    digests = []
    for budget in (2**20, batch(0).nbytes):  # room for graphs, room for one input
        engine = make_engine(dropout=0.5, activation_bytes=budget)
        engine.begin_round(make_plan((0,)))
        client = ToyClient(engine, 0)
        client.forward(batch(0))
        kept = engine.inspect().activations.get((0, 0, 0))
        assert (kept.output is None) == (budget < 2**20)
        client.backward(batch(100))
        digests.append(engine.prepare_round("test", 1, 0, time.monotonic() + 5).digest)
        engine.close()
    assert digests[0] == digests[1]


def test_flood_of_forwards_is_refused_at_the_budget_and_freed_when_the_client_goes():
    engine = make_engine(activation_bytes=2 * batch(0).nbytes)
    engine.begin_round(make_plan(quorum=0.5))
    flood, honest = (ToyClient(engine, slot) for slot in (0, 1))
    with refusal(RefusalReason.OVER_BUDGET):
        for index in range(5):
            flood.forward(batch(0), 0, index, digest=bytes([index]))
    assert engine.inspect().activations.num_bytes <= engine.inspect().activations.budget
    flood.close()
    contribute(honest, 1)
    assert engine.prepare_round("test", 1, 0, time.monotonic() + 5).optimizer_steps == 1
    engine.close()


def test_evaluation_round_leaves_everything_and_needs_no_key(engine):
    engine.begin_round(make_plan((3,), evaluate=True))
    client = ToyClient(engine, 3, 0, evaluate=True)
    result = client.forward(batch(0), mode=ForwardMode.EVALUATE)
    assert torch.equal(result.tensor, batch(0) @ ToyTrunk().weight.detach())
    client.close()
    assert engine.commit_round("test", 1, 0) == 0


def test_new_experiment_starts_from_the_initial_weights(engine):
    start = engine.adapter()["weight"]
    engine.begin_round(make_plan((0,)))
    contribute(ToyClient(engine, 0), 0)
    engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    engine.commit_round("test", 1, 0)
    assert not torch.equal(engine.adapter()["weight"], start)
    engine.begin_round(make_plan((0,), experiment="another"))
    assert torch.equal(engine.adapter()["weight"], start)
    assert engine.status().version == 0


def test_other_experiment_at_work_is_not_pushed_aside(engine):
    engine.begin_round(make_plan((0,)))
    with refusal(RefusalReason.INVALID_REQUEST) as info:
        engine.begin_round(make_plan((0,), experiment="another"))
    assert "one experiment at a time" in str(info.value)


def test_close_wakes_whoever_waits():
    engine = make_engine()
    engine.begin_round(make_plan())
    client = ToyClient(engine, 0, 2)
    contribute(client, 0)
    caught = []

    def wait() -> None:
        try:
            client.forward(batch(1), 1)
        except RoundAborted as error:
            caught.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    engine.close()
    waiter.join(timeout=10)
    assert len(caught) == 1
