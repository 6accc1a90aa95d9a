"""The whole ServerApp with real clients and a real trunk, one client after the other."""

import json
import logging
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flower_split.config import Scalar, parse_run_config
from flower_split.errors import (
    ConfigError,
    FederationError,
    FlowerSplitError,
    SplitError,
    TrunkRefused,
)
from flower_split.protocol.values import RoundPlan
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.trunk.serve import RunningTrunk, Serving
from tests.processes.test_runs import central_step
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_data, make_model, tiny_config
from tests.unit.trunk.test_trunk_server import self_signed


@dataclass(frozen=True)
class Job:
    """Runs tiny jobs in this process."""

    root: Path
    model: Path
    data: str

    def config(self, name: str, **changes: Scalar) -> dict[str, Scalar]:
        config = tiny_config(self.model, self.data, **changes)
        return {**config, "run-dir": str(self.root / name)}

    def run(self, name: str, **changes: Scalar) -> RunDirectory:
        config = self.config(name, **changes)
        run(LocalGrid(2, config), parse_run_config(config))
        return RunDirectory.open(self.root / name)


@pytest.fixture
def job(tmp_path: Path, parts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    return Job(tmp_path, *parts)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("parts")
    return make_model(root / "model"), make_data(root / "data", 2)


@pytest.fixture
def job_with_process(tmp_path: Path, parts: tuple[Path, str]) -> Job:
    """With the trunk in a process of its own: dropout needs its own random state on either side."""
    return Job(tmp_path, *parts)


def trained(state: dict[str, Tensor], layers: range) -> list[bool]:
    """Whether each B of these layers has left its initial zero."""
    names = [f"layers.{layer}." for layer in layers]
    return [
        bool(tensor.count_nonzero())
        for name, tensor in state.items()
        if name.endswith("lora_B.weight") and any(part in name for part in names)
    ]


BOTTOM, TRUNK, TOP = range(0, 1), range(1, 3), range(3, 4)


@pytest.mark.parametrize("step_every", ["server-round", "contribution"])
def test_run_joint_trains_all_three_parts(job: Job, step_every: str) -> None:
    done = job.run("run", trunk__step_every=step_every, train__local_steps=2, num_server_rounds=2)
    client, trunk = done.read_adapter("client"), done.read_adapter("trunk")
    for state, layers in ((client, BOTTOM), (client, TOP), (trunk, TRUNK)):
        found = trained(state, layers)
        assert found and all(found)
    assert [r["server_round"] for r in done.metrics("round")] == [0, 1, 2]


@pytest.mark.parametrize(
    "aggregator",
    [
        "ffa-lora",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("fedit", "rolora", "flexlora", "florist", "hetlora", "lora-fair")
        ),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fed-sb", "fedsvd", "raflora")),
    ],
)
def test_run_with_each_aggregator_trains_the_clients(job: Job, aggregator: str) -> None:
    done = job.run(
        "run",
        strategy__aggregator=aggregator,
        trunk__step_every="server-round",
        num_server_rounds=2,
    )
    client = done.read_adapter("client")
    assert any(trained(client, BOTTOM)) and any(trained(client, TOP))


def test_run_frozen_trains_bottom_and_top_only(job: Job) -> None:
    done = job.run("run", mode="frozen", train__local_steps=2)
    client = done.read_adapter("client")
    assert all(trained(client, BOTTOM)) and all(trained(client, TOP))
    assert not any(trained(done.read_adapter("trunk"), TRUNK))


def test_run_forward_only_trains_the_top_and_says_that_the_bottom_does_not(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="flower_split"):
        done = job.run("run", mode="forward-only", train__local_steps=2)
    client = done.read_adapter("client")
    assert all(trained(client, TOP)) and not any(trained(client, BOTTOM))
    assert "does not train" in caplog.text
    assert "does not train" in (done.path / "report.md").read_text()


def test_run_forward_only_with_the_auxiliary_head_trains_the_bottom(job: Job) -> None:
    done = job.run("run", mode="forward-only", train__auxiliary_head=True, train__local_steps=2)
    client = done.read_adapter("client")
    assert all(trained(client, TOP)) and all(trained(client, BOTTOM))
    assert "does not train" not in (done.path / "report.md").read_text()


@pytest.mark.slow  # two trunk processes; orders in one process: test_federated_equals_central.py
def test_run_twice_gives_the_same_bits(job_with_process: Job) -> None:
    changes: dict[str, Scalar] = {
        "trunk__step_every": "server-round",
        "train__local_steps": 2,
        "train__gradient_accumulation_steps": 2,
        "train__batch_size": 2,
        "lora__trunk__dropout": 0.2,
        "lora__top__dropout": 0.2,
    }
    first, second = (job_with_process.run(name, **changes) for name in ("one", "two"))
    for part in ("client", "trunk"):
        one, two = first.read_adapter(part), second.read_adapter(part)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def equal_count_data(path: Path) -> str:
    """Five records for each of two clients (four to train on), of clearly unequal length."""
    path.mkdir()
    for partition in range(2):
        lines = [
            json.dumps(
                {"prompt": f"{partition}{i}", "completion": "abcdefgh"[i:] * (partition + 1)}
            )
            for i in range(5)
        ]
        (path / f"{partition}.jsonl").write_text("\n".join(lines) + "\n")
    return str(path / "{partition_id}.jsonl")


def distance_from_central(job: Job, tmp_path: Path, **changes: Scalar) -> float:
    """Largest relative difference of an adapter weight from one step of the unsplit model."""
    data = equal_count_data(tmp_path / "data")
    done = job.run("run", data__path=data, trunk__step_every="server-round", **changes)
    found = {**done.read_adapter("client"), **done.read_adapter("trunk")}
    expected = central_step(done.config, 2)
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items()
    )


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_run_of_one_step_equals_the_unsplit_models_also_in_micro_batches(
    job: Job, tmp_path: Path, batch_size: int, accumulation: int
) -> None:
    changes: dict[str, Scalar] = {
        "train__batch_size": batch_size,
        "train__gradient_accumulation_steps": accumulation,
    }
    assert distance_from_central(job, tmp_path, **changes) < 1e-5


def test_run_of_one_step_with_unweighted_averaging_does_not_equal_the_unsplit_models(
    job: Job, tmp_path: Path
) -> None:
    changes: dict[str, Scalar] = {"train__batch_size": 4, "strategy__weighting": "uniform"}
    assert distance_from_central(job, tmp_path, **changes) > 1e-3


def refused(job: Job, error: type[FlowerSplitError], **changes: Scalar) -> str:
    with pytest.raises(error) as caught:
        job.run("run", **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_run_with_cut_layers_beyond_the_model_names_the_range(job: Job) -> None:
    text = refused(job, SplitError, model__second_cut=9)
    assert "4 layers" in text and "second=9" in text


def test_run_with_an_empty_partition_names_it(job: Job, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 2)
    Path(data.replace("{partition_id}", "1")).write_text("")
    text = refused(job, FederationError, data__path=data)
    assert "partition 1" in text and "node 101" in text and "data.path" in text


def test_run_with_a_trunk_of_another_model_names_what_differs(job: Job, tmp_path: Path) -> None:
    other = {**job.config("other"), "lora.trunk.r": 2}
    token = tmp_path / "token"
    with closing(TrunkHere.start(parse_run_config(other), 0)) as trunk:
        token.write_text(trunk.token)
        token.chmod(0o600)
        text = refused(job, ConfigError, trunk__address=trunk.address, trunk__token_file=str(token))
    assert "lora.trunk" in text and "r=2" in text and "r=4" in text


def test_run_on_a_busy_trunk_is_refused_before_any_client_is_asked(
    job: Job, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    with closing(TrunkHere.start(parse_run_config(job.config("other")), 0)) as trunk:
        token.write_text(trunk.token)
        token.chmod(0o600)
        config = {
            **job.config("run"),
            "trunk.address": trunk.address,
            "trunk.token-file": str(token),
        }
        plan = RoundPlan(experiment="theirs", server_round=7, attempt=0, participants={0: "t"})
        with closing(TrunkCoordinator(trunk.address, trunk.token)) as theirs:
            theirs.begin_round(plan)
            grid = LocalGrid(2, config)
            with pytest.raises(TrunkRefused) as caught:
                run(grid, parse_run_config(config))
            assert theirs.status().phase == "joining"  # their round goes on
    text = str(caught.value)
    assert trunk.address in text and "round 7" in text and "theirs" in text
    assert grid.pushed == []


def test_run_over_tls_hands_the_certificate_to_the_clients(job: Job, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    token.chmod(0o600)
    changes: dict[str, Scalar] = {
        "trunk__token_file": str(token),
        "trunk__root_certificates": str(certificate),
        "trunk__step_every": "server-round",
    }
    serving = Serving(token="0123456789abcdef", tls_certificate=str(certificate), tls_key=str(key))
    with RunningTrunk(parse_run_config(job.config("run", **changes)), serving) as trunk:
        done = job.run("run", **changes, trunk__address=f"127.0.0.1:{trunk.port}")
    assert all(trained(done.read_adapter("trunk"), TRUNK))


def test_run_whose_clients_all_fail_in_training_is_an_error(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FederationError("the disk is full. Make room.")

    monkeypatch.setattr("flower_split.client.client.train_round", fail)
    with pytest.raises(FederationError, match="the disk is full") as caught:
        job.run("run", trunk__step_every="server-round")
    assert "\n" not in str(caught.value)
    (command,) = caught.value.__notes__
    assert command.endswith(f"flower-split run APP --resume {job.root / 'run'}")
    assert not (job.root / "run" / "summary.json").exists()
