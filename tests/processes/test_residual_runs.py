"""Real ``flwr run`` jobs of the methods that leave something with the clients or in their base."""

from pathlib import Path

import pytest
import torch

from flower_split.config import Scalar, parse_run_config
from flower_split.results.client_adapter import OneClient, read_client_adapter
from flower_split.runs.directory import RunDirectory
from flower_split.runs.manifest import FOLDER, RunCheckpoints
from flower_split.runs.private_factors import digests_of
from flower_split.server.app import run as run_here
from tests.processes.test_deployment import Deployment, deployment
from tests.support.flower_home import Flower, free_port
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config

__all__ = ["deployment"]  # a fixture


def finished(flower: Flower, root: Path, aggregator: str) -> RunDirectory:
    """A run of two rounds over two clients at the same time."""
    changes: dict[str, Scalar] = {
        "strategy__aggregator": aggregator,
        "num_server_rounds": 2,
        "train__local_steps": 2,
        "local_only_baseline": False,
    }
    config = tiny_config(make_model(root / "model"), make_data(root / "data", 2), **changes)
    app = make_app(root / "app", {**config, "run-dir": str(root / "run")})
    done = flower.command("flower-split", "run", str(app))
    assert done.returncode == 0, done.stdout
    return RunDirectory.open(root / "run")


@pytest.mark.slow
def test_simulated_clients_keep_their_factors_in_the_run_directory(
    flower: Flower, tmp_path: Path
) -> None:
    run = finished(flower, tmp_path, "fedsa-lora")
    (experiment,) = (run.path / "clients").iterdir()
    folders = {path.name: len(list(path.iterdir())) for path in experiment.iterdir()}
    assert folders == {"partition-0": 2, "partition-1": 2}
    assert "no global model" in (run.path / "report.md").read_text()
    command = ("flower-split", "export", str(run.path), "--out", str(tmp_path / "out"))
    refused = flower.command(*command)
    assert refused.returncode == 1 and "--client PARTITION" in refused.stdout
    exported = flower.command(*command, "--client", "1")
    assert exported.returncode == 0, exported.stdout
    assert (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_simulated_run_keeps_what_went_into_the_base(flower: Flower, tmp_path: Path) -> None:
    run = finished(flower, tmp_path, "flora")
    change = run.read_adapter("base")
    assert change and any(tensor.any() for tensor in change.values())
    assert "adapters/base.safetensors" in (run.path / "report.md").read_text()
    out = str(tmp_path / "out")
    exported = flower.command("flower-split", "export", str(run.path), "--out", out)
    assert exported.returncode == 0, exported.stdout
    text = flower.command(
        "flower-split", "generate", str(run.path), "--prompt", "00", "--max-new-tokens", "2"
    )
    assert text.returncode == 0, text.stdout


@pytest.mark.timeout(1800)
@pytest.mark.slow  # a process for every message
def test_deployed_clients_keep_their_factors_where_their_node_says(
    deployment: Deployment,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes: dict[str, Scalar] = {
        "strategy__aggregator": "fedsa-lora",
        "num_server_rounds": 2,
        "fraction_evaluate": 0.0,
        "local_only_baseline": False,
        "trunk__step_every": "server-round",
    }
    config = tiny_config(make_model(tmp_path / "model"), make_data(tmp_path / "data", 2), **changes)
    port = free_port()
    (deployment.home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    deployment.start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
    own = {partition: tmp_path / f"disk-{partition}" for partition in range(2)}
    for partition, disk in own.items():
        deployment.start(
            "flower-supernode",
            *("--insecure", "--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1"),
            *("--port", str(free_port())),
            "--node-config",
            f'partition-id={partition} num-partitions=2 client-dir="{disk}"',
        )
    app = make_app(tmp_path / "app", {**config, "run-dir": str(tmp_path / "deployed")})
    flower = Flower(deployment.home, deployment.env)
    done = flower.command("flower-split", "run", str(app), "loopback", "--stream", timeout=1500)
    assert done.returncode == 0, done.stdout + deployment.tails()
    deployed = RunDirectory.open(tmp_path / "deployed")
    assert not (deployed.path / "clients").exists()

    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    here = {**config, "run-dir": str(tmp_path / "here"), "train.client-dir": str(tmp_path / "own")}
    run_here(LocalGrid(2, here), parse_run_config(here))
    for partition, disk in own.items():
        (experiment,) = disk.iterdir()
        assert [path.name for path in experiment.iterdir()] == [f"partition-{partition}"]
        found = read_client_adapter(deployed, OneClient(partition_id=partition, client_dir=disk))
        expected = read_client_adapter(
            RunDirectory.open(tmp_path / "here"), OneClient(partition_id=partition)
        )
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)
    last = RunCheckpoints(deployed.path / FOLDER).latest()
    assert last is not None and sorted(digests_of(last.strategy)) == [0, 1]
