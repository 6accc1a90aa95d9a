"""Real ``flwr run`` jobs of the methods that leave something with the clients or in their base."""

from pathlib import Path

import pytest

from flower_split.config import Scalar
from flower_split.report import RunDirectory
from tests.flower.conftest import Flower
from tests.flower.tiny import make_app, make_data, make_model, tiny_config


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
