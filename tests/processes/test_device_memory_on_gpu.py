"""A client and a trunk as two processes of one GPU: tensors stay there, and a kill leaves nothing."""

import copy
import gc
import os
import signal
from multiprocessing.connection import Connection

import pytest
import torch

from flower_split.errors import TrunkUnavailable
from flower_split.runtime import failpoints
from flower_split.trunk.service.server import TrunkServer
from flower_split.wire.device_memory import DeviceHalf, device_digest
from tests.processes.test_shared_memory import SECONDS, answer, process
from tests.support.loopback import (
    COORDINATOR_TOKEN,
    HIDDEN,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
)

pytestmark = pytest.mark.gpu

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def make_trunk() -> TinyTrunk:
    torch.manual_seed(3)
    return TinyTrunk().cuda()


def serve(ours: Connection, places: str) -> None:
    failpoints.switch_on_from(places)
    engine = make_engine(make_trunk())
    with TrunkServer(engine, coordinator_token=COORDINATOR_TOKEN) as server:
        engine.begin_round(plan(join_seconds=SECONDS, window_seconds=SECONDS))
        ours.send(server.start())
        ours.poll(None)
    engine.close()


def work(ours: Connection, port: int) -> None:
    """A client that stays after its forward."""
    trunk = remote(port, transport="auto", call_timeout=SECONDS)
    trunk.open(2)
    hidden = torch.ones(8, 512, HIDDEN, device="cuda", requires_grad=True)
    with trunk.micro_batch(0, 0, num_tokens=5, loss_denominator=5.0, last=True):
        trunk(hidden)
    ours.send("forward")
    ours.recv()


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each tensor that this process sent stayed on the GPU."""
    found: list[bool] = []
    put = DeviceHalf.put

    def noted(half: DeviceHalf, tensors: list[torch.Tensor]) -> object:
        place = put(half, tensors)
        found.append(place is not None)
        return place

    monkeypatch.setattr(DeviceHalf, "put", noted)
    return found


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=two_gpus)])
def test_gpu_tensors_stay_on_gpus_with_the_bits_of_one_process(
    device: str, puts: list[bool]
) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 64, HIDDEN, device=device)
    mask = torch.ones(3, 64, dtype=torch.int64, device=device)
    mask[0, :9] = 0
    bottom, local = torch.nn.Linear(HIDDEN, HIDDEN).to(device), make_trunk().to(device)
    wired_bottom = copy.deepcopy(bottom)
    expected = local(bottom(features), mask, None).square().mean()
    expected.backward()
    with process(serve, "") as (_, ready):
        with remote(answer(ready), transport="auto", call_timeout=SECONDS) as trunk:
            trunk.open(1)
            with trunk.micro_batch(0, 0, num_tokens=9, loss_denominator=9.0, last=True):
                loss = trunk(wired_bottom(features), mask, None).square().mean()
            loss.backward()
            assert trunk.wait_version(1) == 1
    assert torch.equal(loss, expected)
    assert torch.equal(wired_bottom.weight.grad, bottom.weight.grad)
    assert puts == [True, True]


@pytest.mark.parametrize("place", ["trunk.forward.computed", "trunk.backward.accumulated"])
def test_gpu_of_a_client_goes_on_when_its_trunk_is_killed(place: str, puts: list[bool]) -> None:
    free = torch.cuda.mem_get_info()[0]
    with process(serve, f"{place}=kill") as (_, ready):
        trunk = remote(answer(ready), transport="auto", call_timeout=6.0)
        trunk.open(2)
        hidden = torch.ones(8, 512, HIDDEN, device="cuda", requires_grad=True)
        with pytest.raises(TrunkUnavailable):
            with trunk.micro_batch(0, 0, num_tokens=5, loss_denominator=5.0, last=True):
                output = trunk(hidden)
            output.sum().backward()
        trunk.close()
    assert puts and all(puts)
    assert float(torch.ones(1000, device="cuda").sum()) == 1000.0
    output = None
    gc.collect()
    assert torch.cuda.mem_get_info()[0] > free - (1 << 28)


def test_gpu_of_a_trunk_goes_on_when_its_client_is_killed(puts: list[bool]) -> None:
    with process(serve, "") as (_, ready):
        port = answer(ready)
        with process(work, port) as (client, pipe):
            assert answer(pipe) == "forward"
            os.kill(client, signal.SIGKILL)
        with coordinator(port, timeout=SECONDS) as control:
            control.begin_round(plan(attempt=1, participants={0: "token-1"}, join_seconds=SECONDS))
        with remote(port, token="token-1", transport="auto", call_timeout=SECONDS) as again:
            again.open(1)
            hidden = torch.ones(1, 9, HIDDEN, device="cuda", requires_grad=True)
            with again.micro_batch(0, 0, num_tokens=5, loss_denominator=5.0, last=True):
                again(hidden).sum().backward()
    assert puts == [True, True]


def test_gpu_digest_is_that_of_the_same_bytes_on_the_cpu() -> None:
    data = torch.randint(0, 256, (100_003,), dtype=torch.uint8)
    assert device_digest(data.cuda()) == device_digest(data)
