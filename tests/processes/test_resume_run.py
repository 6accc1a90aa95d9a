"""A real ``flwr run`` whose ServerApp was killed goes on with ``flower-split run --resume``."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flower_split.runs.directory import RunDirectory
from flower_split.runtime.failpoints import VARIABLE
from flower_split.server.federation.handshake import federation_config
from tests.support.flower_home import Flower, end, make_environment, processes_of
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config

ROUNDS = 3


@pytest.fixture
def flowers(tmp_path: Path) -> Iterator[tuple[Flower, Flower]]:
    """Two isolated Flowers; in the second every ServerApp dies before its third commit."""
    homes = [tmp_path / "calm", tmp_path / "killing"]
    environments = []
    for home in homes:
        home.mkdir()
        environments.append(make_environment(home))
    # Rounds 0 and 1 are committed, round 2 is not; what resumes commits rounds 2 and 3 only.
    environments[1][VARIABLE] = "server.commit.before=kill@3"
    try:
        yield Flower(homes[0], environments[0]), Flower(homes[1], environments[1])
    finally:
        for home in homes:
            end(processes_of(home))


@pytest.mark.slow
def test_resumed_run_ends_on_the_adapters_of_the_run_that_was_not_killed(
    flowers: tuple[Flower, Flower], tmp_path: Path
) -> None:
    calm, killing = flowers
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", 2)
    changes = {"num_server_rounds": ROUNDS, "train__local_steps": 2, "round_timeout": 120.0}
    config = tiny_config(model, data, **changes)
    config |= {f"{side}.optimizer.name": "adamw" for side in ("train", "trunk")}
    config |= {f"lora.{part}.dropout": 0.1 for part in ("bottom", "trunk", "top")}
    runs = {}
    for name, flower in (("calm", calm), ("killing", killing)):
        run_dir = tmp_path / f"run-{name}"
        app = make_app(tmp_path / f"app-{name}", {**config, "run-dir": str(run_dir)})
        outcome = flower.run(app, {}, federation_config(2))
        assert (outcome.status == "finished:completed") == (name == "calm"), outcome.output
        runs[name] = (app, RunDirectory.open(run_dir))
    app, directory = runs["killing"]
    assert not (directory.path / "summary.json").exists()
    resumed = killing.command("flower-split", "run", str(app), "--resume", str(directory.path))
    assert resumed.returncode == 0, resumed.stdout
    for part in ("client", "trunk"):
        expected = runs["calm"][1].read_adapter(part)
        actual = directory.read_adapter(part)
        assert list(actual) == list(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    rounds = [record["server_round"] for record in directory.metrics("round")]
    assert rounds == list(range(ROUNDS + 1))  # none lost, none twice
