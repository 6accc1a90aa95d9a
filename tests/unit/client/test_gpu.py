"""The remote trunk with CUDA tensors: staging, streams, and backwards that do not queue up."""

import copy
import threading

import pytest
import torch

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.wire.staging import to_device, to_host
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

pytestmark = pytest.mark.gpu


def in_threads(number: int, run: object) -> None:
    """``run(index)`` on ``number`` threads; the first error is raised."""
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            run(index)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


def test_gpu_client_and_trunk_match_in_process_bitwise() -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 64, HIDDEN, device="cuda")
    mask = torch.ones(3, 64, dtype=torch.int64, device="cuda")
    mask[0, :9] = 0
    bottom, local = torch.nn.Linear(HIDDEN, HIDDEN).cuda(), TinyTrunk().cuda()
    held, wired_bottom = copy.deepcopy(local), copy.deepcopy(bottom)
    expected = local(bottom(features), mask, None).square().mean()
    expected.backward()
    with served(make_engine(held)) as port, coordinator(port) as control:
        control.begin_round(plan())
        with remote(port) as trunk:
            trunk.open(1)
            with trunk.micro_batch(0, 0, num_tokens=9, loss_denominator=9.0, last=True):
                loss = trunk(wired_bottom(features), mask, None).square().mean()
            loss.backward()
            assert trunk.wait_version(1) == 1
    assert loss.device.type == "cuda" and torch.equal(loss, expected)
    assert torch.equal(wired_bottom.weight.grad, bottom.weight.grad)


def test_gpu_backwards_of_several_micro_batches_are_at_the_trunk_at_once() -> None:
    """Autograd has one backward thread per device: a call made on it would hold the others up."""
    changed = threading.Condition()

    def on_call(method: str, number: int) -> None:
        def keys() -> set[object]:
            return {call.key for name, (call, *_) in engine.calls if name == "backward"}

        if method == "backward":
            with changed:
                changed.notify_all()
                assert changed.wait_for(lambda: len(keys()) == 3, timeout=5), "they queue up"

    engine = FakeEngine(on_call)
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)

        def run(index: int) -> None:
            hidden = torch.ones(1, 2, HIDDEN, device="cuda", requires_grad=True)
            with trunk.micro_batch(0, index, num_tokens=1, loss_denominator=1.0, last=False):
                output = trunk(hidden)
            (3 * output).sum().backward()
            assert torch.equal(hidden.grad, torch.full_like(hidden, 6.0))

        in_threads(3, run)


def test_gpu_activations_survive_streams_and_reused_pinned_memory() -> None:
    """Large tensors, made by slow kernels on streams of their own, from several threads."""
    engine = FakeEngine()
    engine.fingerprint = {**FINGERPRINT, "codec": "bfloat16"}
    with served(engine) as port, remote(port, fingerprint=engine.fingerprint) as trunk:
        trunk.open(1)
        in_threads(4, lambda index: _exchange_many(trunk, index))


def _exchange_many(trunk: RemoteTrunk, index: int) -> None:
    generator = torch.Generator("cuda").manual_seed(index)
    with torch.cuda.stream(torch.cuda.Stream()):
        for step in range(5):
            slow = torch.randn(3000, 3000, device="cuda", generator=generator)
            for _ in range(10):
                slow = slow @ slow / 3000
            values = torch.randint(-50, 50, (4, 512, 1024), device="cuda", generator=generator)
            hidden = (values.bfloat16() + 0 * slow[0, 0].nan_to_num()).requires_grad_()
            with trunk.micro_batch(step, index, num_tokens=1, loss_denominator=1.0, last=False):
                output = trunk(hidden)
            weight = torch.randint(-9, 9, output.shape, device="cuda", generator=generator)
            (output * weight).sum().backward()
            assert torch.equal(output, 2 * values.bfloat16())
            assert torch.equal(hidden.grad, 2 * weight.bfloat16())


def test_gpu_staging_is_pinned_and_complete_on_return() -> None:
    slow = torch.randn(6000, 6000, device="cuda")
    for _ in range(20):
        slow = slow @ slow / 6000
    source = torch.arange(1 << 22, device="cuda") + 0 * slow[0, 0].nan_to_num().long()
    host = to_host(source)
    assert host.is_pinned() and torch.equal(host, torch.arange(1 << 22))
    assert torch.equal(to_device(host, torch.device("cuda")), source)
