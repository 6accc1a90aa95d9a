"""A trunk of two processes: same bits in any order, and what follows when one of them is killed."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flower_split.cli.trunk import TrunkCommand, serve_trunk
from flower_split.config import RunConfig, parse_run_config, resolved_run_config
from flower_split.errors import ConfigError, TrunkError, TrunkUnavailable
from flower_split.protocol.values import RoundBase
from flower_split.runtime.exit_codes import FAILED
from flower_split.server.trunk_process import TrunkProcess
from flower_split.trunk.build import make_engine
from flower_split.trunk.follow import follower_configs
from flower_split.trunk.serve import RunningTrunk, Serving
from flower_split.wire.grpc_health import health_of
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config
from tests.support.trunk_rounds import SECONDS, SLOTS, TOKEN, Run, train

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("replicas")
    return parse_run_config(
        tiny_config(
            make_model(root / "model"),
            make_data(root / "data", 3),
            num_clients=3,
            lora__trunk__dropout=0.2,
            trunk__window_batches="on",
            trunk__replicas=2,
        )
    )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])])
def device(request: pytest.FixtureRequest) -> str:
    """The trunk on the CPU, and on two GPUs."""
    return str(request.param)


@pytest.fixture(params=["replicas", "tensor-parallel"])
def placed(config: RunConfig, device: str, request: pytest.FixtureRequest) -> RunConfig:
    """Two processes that share the clients, and two that divide the layers."""
    trunk = replace(config.trunk, device=device)
    if request.param == "tensor-parallel":
        trunk = replace(trunk, replicas=1, tensor_parallel=2)
    return replace(config, trunk=trunk)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    yield Serving(token=TOKEN, checkpoints=str(tmp_path / "checkpoints"))
    assert not multiprocessing.active_children(), "a follower outlived its trunk"


def test_killed_follower_ends_the_trunk_and_the_round_is_done_again_with_the_same_bits(
    placed: RunConfig, serving: Serving
) -> None:
    where = "cuda:1" if placed.trunk.device == "cuda" else "cpu"
    with RunningTrunk(placed, serving) as trunk, closing(Run(placed, trunk.port)) as run:
        start = RoundBase(0)
        first = run.round(1, 0, start, SLOTS)
        base = RoundBase(1, first.digest)
        run.control.commit_round("e", 1, 0)
        undisturbed = run.round(2, 0, base, (1, 2, 0))
        clients = run.begin(2, 1, base, 2.0)  # the round is done again, for another reason
        (follower,) = multiprocessing.active_children()
        assert health_of(f"127.0.0.1:{trunk.port}") == "SERVING"
        os.kill(follower.pid or 0, signal.SIGKILL)
        began = time.monotonic()
        with ThreadPoolExecutor(len(SLOTS)) as pool:
            for future in [pool.submit(train, clients[slot], slot, 2) for slot in SLOTS]:
                assert isinstance(future.exception(SECONDS), TrunkError)
        while not trunk.failure:
            assert time.monotonic() - began < 5.0, "nobody has noticed"
        noun = "replica" if placed.trunk.replicas > 1 else "rank"
        assert f"{noun} 1 ({where}), process {follower.pid}, ended with code -9" in trunk.failure
        assert health_of(f"127.0.0.1:{trunk.port}") == "NOT_SERVING"
    with RunningTrunk(placed, serving) as trunk, closing(Run(placed, trunk.port)) as run:
        again = run.round(2, 2, base, (2, 0, 1))
    assert again.digest == undisturbed.digest != first.digest


@pytest.mark.slow
def test_trunk_process_ends_with_its_follower_and_the_follower_with_it(config: RunConfig) -> None:
    with closing(TrunkProcess.start(config, 120)) as trunk:
        follower = follower_of(trunk)
        os.kill(follower, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while trunk.alive:
            assert time.monotonic() < deadline, "the trunk goes on without its follower"
            time.sleep(0.01)
        assert trunk._process.returncode == FAILED
        trunk.restart()
        second = follower_of(trunk)
        assert second != follower
        trunk._process.kill()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{second}").exists():
            assert time.monotonic() < deadline, "the follower outlives its leader"
            time.sleep(0.01)


def follower_of(trunk: TrunkProcess) -> int:
    """The process id of the trunk's only follower."""
    found = []
    for task in Path(f"/proc/{trunk._process.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
    (follower,) = found
    return follower


# ---------------------------------------------------------------------- without processes


def test_trunk_command_that_loses_a_replica_fails_with_the_reason(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Losing:
        port = metrics_port = 1
        failure = "replica 1 ended"

        def __enter__(self) -> "Losing":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def on_failure(self, tell: Callable[[str], None]) -> None:
            tell(self.failure)

    reasons: list[str] = []
    monkeypatch.setattr("flower_split.cli.trunk.RunningTrunk", lambda *_: Losing())
    monkeypatch.setattr("flower_split.cli.trunk.end_soon", reasons.append)
    app = make_app(tmp_path / "app", resolved_run_config(config))
    command = TrunkCommand(app=app, listen="127.0.0.1:0", token_file=tmp_path / "token")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(TrunkUnavailable, match="replica 1 ended"):
            serve_trunk(command)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert reasons == ["replica 1 ended"]


def test_followers_take_the_next_devices_and_more_than_there_are_are_refused(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [one.trunk.device for one in follower_configs(config)] == ["cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def devices(name: str, count: int) -> list[str]:
        trunk = parse_run_config(
            {"trunk.device": name, "trunk.window-batches": "on"} | shared(count)
        )
        return [one.trunk.device for one in follower_configs(trunk)]

    def shared(count: int) -> dict[str, object]:
        return {"trunk.replicas": count, "model.first-cut": 1, "model.second-cut": 3}

    assert devices("auto", 4) == ["cuda:1", "cuda:2", "cuda:3"]
    assert devices("cuda:1", 3) == ["cuda:2", "cuda:3"]
    with pytest.raises(ConfigError, match="from cuda:2 on, and torch sees 4 CUDA devices"):
        devices("cuda:2", 3)


def test_engine_without_its_followers_is_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="this one leads no others"):
        make_engine(config)
