"""The remote trunk through a real server: equal to the same trunk in process, bit for bit."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from flower_split.errors import RefusalReason, TrunkError, TrunkRefused
from flower_split.protocol.values import ForwardMode
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.shares import Shares
from tests.support.loopback import (
    FINGERPRINT,
    HIDDEN,
    FakeEngine,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)


class Client(nn.Module):
    """A bottom, a trunk and a top, on random features instead of tokens."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.bottom = nn.Linear(4, HIDDEN)
        self.trunk = trunk
        self.top = nn.Linear(HIDDEN, 3)

    def forward(self, features: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        return self.top(self.trunk(self.bottom(features), mask, positions))


def batch(seed: int, size: int = 2, length: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, length, 4, generator=generator)
    labels = torch.randint(0, 3, (size, length), generator=generator)
    mask = torch.ones(size, length, dtype=torch.int64)
    mask[0, :2] = 0
    return features, mask, torch.arange(length).unsqueeze(0), labels


def loss_of(client: Client, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    features, mask, positions, labels = data
    logits = client(features, mask, positions)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 10


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_identical(left: Tensor, right: Tensor) -> None:
    assert left.dtype == right.dtype and torch.equal(left, right)


@contextmanager
def joined(engine: TrunkEngine, steps: int = 1, mode: str = "joint", **changes: object) -> Iterator:
    with served(engine) as port, coordinator(port) as control:
        control.begin_round(plan())
        with remote(port, mode=mode, **changes) as trunk:
            trunk.open(steps)
            yield trunk


def test_remote_loss_and_every_gradient_equal_in_process_bit_for_bit() -> None:
    local = Client(TinyTrunk())
    expected = loss_of(local, batch(0))
    expected.backward()
    held = TinyTrunk()
    start = {name: p.detach().clone() for name, p in held.named_parameters()}
    with joined(make_engine(held)) as trunk:
        client = Client(trunk)
        with trunk.micro_batch(0, 0, num_tokens=10, loss_denominator=10.0, last=True):
            loss = loss_of(client, batch(0))
        loss.backward()
        trunk.wait_version(1)
    assert_identical(loss, expected)
    for name, gradient in gradients(client).items():
        assert_identical(gradient, gradients(local)[name])
    # One SGD step at 0.1: the trunk's gradient is read off its weights.
    for name, parameter in held.named_parameters():
        wanted = start[name] - 0.1 * gradients(local.trunk)[name]
        torch.testing.assert_close(parameter, wanted, rtol=1e-6, atol=1e-7)
        assert not torch.equal(parameter, start[name])


def test_remote_micro_batches_in_flight_from_threads_equal_the_union_step() -> None:
    local, number = Client(TinyTrunk()), 4
    for index in range(number):
        loss_of(local, batch(index)).backward()
    held = TinyTrunk()
    start = copy.deepcopy(held)
    compute = threading.Lock()  # the client's one processor, given back while a call waits
    together = threading.Barrier(number)

    @contextmanager
    def waiting() -> Iterator[None]:
        compute.release()
        try:
            yield
        finally:
            compute.acquire()

    with joined(make_engine(held)) as trunk:
        clients = [Client(trunk) for _ in range(number)]
        trunk.waiting = waiting
        failures: list[BaseException] = []

        def run(index: int) -> None:
            try:
                together.wait(20)
                with compute:
                    with trunk.micro_batch(
                        0, index, num_tokens=10, loss_denominator=10.0, last=index == number - 1
                    ):
                        loss = loss_of(clients[index], batch(index))
                    loss.backward()
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert failures == []
        trunk.waiting = lambda: contextmanager(lambda: iter([None]))()
        trunk.wait_version(1)
        assert trunk.stats.calls == 2 * number
    for index, client in enumerate(clients):
        alone = Client(copy.deepcopy(start))
        loss_of(alone, batch(index)).backward()
        assert_identical(client.bottom.weight.grad, alone.bottom.weight.grad)
        assert_identical(client.top.weight.grad, alone.top.weight.grad)
    # Σ nᵢ gᵢ / Σ nᵢ over equal token counts is the mean of the micro-batches' gradients.
    for (_, parameter), (name, before) in zip(
        held.named_parameters(), start.named_parameters(), strict=True
    ):
        wanted = before - 0.1 * gradients(local.trunk)[name] / number
        torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-7)


def test_remote_frozen_bottom_still_trains_the_trunk() -> None:
    held = TinyTrunk()
    before = copy.deepcopy(held.state_dict())
    with joined(make_engine(held)) as trunk:
        client = Client(trunk)
        client.bottom.requires_grad_(False)
        with trunk.micro_batch(0, 0, num_tokens=10, loss_denominator=10.0, last=True):
            loss = loss_of(client, batch(0))
        loss.backward()
        assert trunk.wait_version(1) == 1
    assert not torch.equal(held.one.weight, before["one.weight"])


def test_remote_joint_every_part_has_a_gradient() -> None:
    """The two published bugs: a bottom cut off by detach, and a backward that is the identity."""
    held = TinyTrunk()
    before = copy.deepcopy(held)
    with joined(make_engine(held)) as trunk:
        client = Client(trunk)
        with trunk.micro_batch(0, 0, num_tokens=10, loss_denominator=10.0, last=True):
            smashed = client.bottom(batch(0)[0])
            smashed.retain_grad()
            output = client.trunk(smashed)
            output.retain_grad()
        client.top(output).square().sum().backward()
        trunk.wait_version(1)
    assert client.bottom.weight.grad.abs().sum() > 0
    assert not torch.allclose(smashed.grad, output.grad)
    for name, parameter in held.named_parameters():
        assert not torch.equal(parameter, before.get_parameter(name)), name


def test_remote_evaluation_needs_no_micro_batch_and_keeps_nothing() -> None:
    engine = make_engine(TinyTrunk())
    with served(engine) as port, coordinator(port) as control:
        control.begin_round(plan(evaluate=True))
        with remote(port) as trunk:
            trunk.open(0, evaluate=True)
            features = batch(1)[0]
            client, local = Client(trunk), Client(TinyTrunk())
            output = client.trunk(client.bottom(features))  # autograd on: still an evaluation
            assert not output.requires_grad
            assert_identical(output, local.trunk(local.bottom(features)).detach())
    assert engine.status().version == 0


def test_remote_no_grad_within_a_training_session_evaluates() -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)
        with torch.no_grad():
            trunk(torch.ones(1, 2, HIDDEN))
    ((call,),) = [args for name, args in engine.calls if name == "forward"]
    assert call.key is None and call.mode is ForwardMode.EVALUATE


def test_remote_forward_only_returns_an_output_without_grad() -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port, mode="forward-only") as trunk:
        trunk.open(1)
        client = Client(trunk)
        with trunk.micro_batch(2, 1, num_tokens=10, loss_denominator=10.0, last=True):
            output = client.trunk(client.bottom(batch(0)[0]))
        assert not output.requires_grad
        client.top(output).sum().backward()
    assert client.bottom.weight.grad is None and client.top.weight.grad is not None
    assert engine.count("backward") == 0
    ((call,),) = [args for name, args in engine.calls if name == "forward"]
    assert call.mode is ForwardMode.NO_GRAD and (call.key.window, call.key.micro_batch) == (2, 1)
    assert call.version == 10 + 2


def test_remote_calls_carry_key_version_counts_and_content() -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk:
        grant = trunk.open(3)
        assert (grant.session, grant.epoch, grant.version) == ("session-of-token-0", 7, 10)
        hidden = torch.ones(2, 3, HIDDEN, requires_grad=True)
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        with trunk.micro_batch(1, 2, num_tokens=5, loss_denominator=8.0, last=False):
            output = trunk(hidden, mask, torch.tensor([[4, 5, 6]]))
        (3 * output).sum().backward()
        stats = trunk.stats
    assert torch.equal(hidden.grad, torch.full_like(hidden, 6.0))
    calls = dict(engine.calls)
    assert calls["open_session"] == ("token-0", {"model": "tiny", "protocol": "1"}, 3, False, None)
    (forward,), (backward,) = calls["forward"], calls["backward"]
    assert (forward.session, forward.epoch) == ("session-of-token-0", 7)
    assert (forward.version, forward.mode) == (11, ForwardMode.TRAIN)
    key = forward.key
    assert (key.experiment, key.server_round, key.attempt) == ("e", 1, 0)
    assert (key.window, key.micro_batch) == (1, 2)
    assert_identical(forward.tensors["attention_mask"], mask)
    assert_identical(forward.tensors["position_ids"], torch.tensor([[4, 5, 6]]))
    assert len(forward.digest) == 16
    assert (backward.session, backward.epoch, backward.key) == ("session-of-token-0", 7, key)
    assert backward.version == 10  # that of the reply
    counts = (backward.num_tokens, backward.loss_denominator, backward.last)
    assert counts == (5.0, 8.0, False)
    assert_identical(backward.grad, torch.full((2, 3, HIDDEN), 3.0))
    assert (stats.calls, stats.trunk_compute_seconds, stats.trunk_queue_seconds) == (2, 0.5, 1.0)
    received = sum(entry[1] for entry in engine.bytes)
    sent = sum(entry[2] for entry in engine.bytes)
    assert (stats.bytes_sent, stats.bytes_received) == (received, sent)
    assert received > 2 * hidden.nbytes
    assert trunk.take_stats() == stats and trunk.stats.calls == 0


def test_remote_bfloat16_on_the_wire_converts_there_and_back() -> None:
    engine = FakeEngine()
    engine.fingerprint = {**FINGERPRINT, "codec": "bfloat16"}
    with served(engine) as port, remote(port, fingerprint=engine.fingerprint) as trunk:
        trunk.open(1)
        hidden = torch.full((1, 2, HIDDEN), 1.00390625, requires_grad=True)  # 1 + 2^-8: a tie
        with trunk.micro_batch(0, 0, num_tokens=1, loss_denominator=1.0, last=True):
            output = trunk(hidden)
        (output * (1 + 2**-12)).sum().backward()
    calls = dict(engine.calls)
    assert calls["forward"][0].tensors["hidden_states"].dtype == torch.bfloat16
    assert calls["backward"][0].grad.dtype == torch.bfloat16
    assert output.dtype == torch.float32 and torch.equal(output, torch.full_like(output, 2.0))
    assert hidden.grad.dtype == torch.float32
    assert torch.equal(hidden.grad, torch.full_like(hidden, 2.0))  # 1 + 2^-12 rounds to 1 in bf16


def test_remote_native_bfloat16_travels_as_its_raw_bits() -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)
        hidden = torch.randn(1, 2, HIDDEN).bfloat16()
        with torch.no_grad():
            output = trunk(hidden)
    assert_identical(dict(engine.calls)["forward"][0].tensors["hidden_states"], hidden)
    assert_identical(output, 2 * hidden)


def test_remote_training_forward_outside_micro_batch_raises() -> None:
    with served(FakeEngine()) as port, remote(port) as trunk:
        trunk.open(1)
        with pytest.raises(TrunkError, match="micro_batch"):
            trunk(torch.ones(1, 1, HIDDEN))


def test_remote_second_forward_in_one_micro_batch_raises() -> None:
    with served(FakeEngine()) as port, remote(port) as trunk:
        trunk.open(1)
        with trunk.micro_batch(0, 0, num_tokens=1, loss_denominator=1.0, last=True):
            trunk(torch.ones(1, 1, HIDDEN))
            with pytest.raises(TrunkError, match="has made its forward"):
                trunk(torch.ones(1, 1, HIDDEN))
            with (
                pytest.raises(TrunkError, match="stands inside"),
                trunk.micro_batch(0, 1, num_tokens=1, loss_denominator=1.0, last=True),
            ):
                pass


def test_remote_second_backward_raises() -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)
        with trunk.micro_batch(0, 0, num_tokens=1, loss_denominator=1.0, last=True):
            output = trunk(torch.ones(1, 1, HIDDEN, requires_grad=True))
        output.sum().backward(retain_graph=True)
        with pytest.raises(TrunkError, match="has had its backward"):
            output.sum().backward()
    assert engine.count("backward") == 1


def test_remote_double_differentiation_raises() -> None:
    with served(FakeEngine()) as port, remote(port) as trunk:
        trunk.open(1)
        hidden = torch.ones(1, 1, HIDDEN, requires_grad=True)
        with trunk.micro_batch(0, 0, num_tokens=1, loss_denominator=1.0, last=True):
            output = trunk(hidden)
        (gradient,) = torch.autograd.grad(output.square().sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_remote_mask_that_is_not_a_padding_mask_raises() -> None:
    with served(FakeEngine()) as port, remote(port) as trunk, torch.no_grad():
        trunk.open(1)
        for mask in (torch.zeros(1, 2, 2), torch.full((1, 2), -1e9), torch.tensor([[2, 1]])):
            with pytest.raises(TrunkError, match="padding mask"):
                trunk(torch.ones(1, 2, HIDDEN), mask)


def test_remote_call_without_a_session_raises() -> None:
    with remote(1) as trunk, torch.no_grad(), pytest.raises(TrunkError, match="open"):
        trunk(torch.ones(1, 2, HIDDEN))


def test_remote_other_fingerprint_is_refused_with_the_field() -> None:
    engine = make_engine(TinyTrunk())
    with served(engine) as port, coordinator(port) as control:
        control.begin_round(plan())
        with remote(port, fingerprint={"model": "other", "protocol": "1"}) as trunk:
            with pytest.raises(TrunkRefused, match="model") as caught:
                trunk.open(1)
            assert caught.value.reason is RefusalReason.FINGERPRINT_MISMATCH


def test_remote_non_finite_smashed_data_is_refused_typed() -> None:
    engine = make_engine(TinyTrunk(), shares=Shares(evaluations=1))
    with joined(engine) as trunk, torch.no_grad():
        hidden = torch.ones(1, 2, HIDDEN)
        hidden[0, 0, 0] = float("nan")
        with pytest.raises(TrunkRefused) as caught:
            trunk(hidden)
        assert caught.value.reason is RefusalReason.NON_FINITE


def test_remote_large_activations_cross_in_several_frames() -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)
        hidden = torch.randn(8, 512, 300, requires_grad=True)  # 4.9 MB: five frames
        with trunk.micro_batch(0, 0, num_tokens=1, loss_denominator=1.0, last=True):
            output = trunk(hidden)
        output.sum().backward()
    assert_identical(output.detach(), 2 * hidden.detach())
    assert torch.equal(hidden.grad, torch.full_like(hidden, 2.0))


def test_remote_more_bytes_than_the_trunk_takes_raises_before_sending() -> None:
    engine = FakeEngine()
    with served(engine, max_tensor_bytes=1000) as port, remote(port) as trunk, torch.no_grad():
        trunk.open(1)
        with pytest.raises(Exception, match="may carry 1000 bytes"):
            trunk(torch.ones(1, 100, HIDDEN))
    assert engine.count("forward") == 0
