"""Several experiments at once on one trunk: each ends on the weights that it has alone."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.errors import ConfigError
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.trunk_connection import check_settings
from flower_split.trunk.build import make_engine
from flower_split.trunk.serve import RunningTrunk, Serving
from flower_split.trunk.service.server import TrunkServer
from tests.acceptance.federation import make_config, write_checkpoint
from tests.support.experiments_rig import TOKEN, Job, run_all, several, varied
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_data, make_model, tiny_config


def alone(name: str, config: RunConfig) -> str:
    """The digest of a job on a trunk that serves it alone."""
    threads = torch.get_num_threads()
    engine = make_engine(config)
    try:
        with TrunkServer(engine, coordinator_token=TOKEN) as server:
            return Job(name, config, server.start(), brings=False).run()
    finally:
        engine.close()
        torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_experiments_at_once_end_on_the_weights_that_each_has_alone(
    tmp_path: Path, count: int
) -> None:
    config = make_config(write_checkpoint(tmp_path / "model"))
    config = replace(config, train=replace(config.train, local_steps=2))
    configs = {f"e{number}": varied(config, number) for number in range(count)}
    expected = {name: alone(name, one) for name, one in configs.items()}
    assert len(set(expected.values())) == count
    with several(config, tmp_path / "checkpoints") as trunk:
        jobs = [Job(name, one, trunk.port) for name, one in configs.items()]
        assert run_all(jobs) == expected
        assert sorted(trunk.experiments.engines()) == sorted(configs)
        trunk.engines.base.check_untouched()


def test_runs_bring_their_settings_to_a_trunk_that_is_at_work_and_leave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole runs, one after the other: two threads cannot load models of transformers at once."""
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", 2)
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)

    def train(name: str, **changes: Scalar) -> dict[str, torch.Tensor]:
        config = tiny_config(model, data, **changes) | {"run-dir": str(tmp_path / name)}
        run(LocalGrid(2, config), parse_run_config(config))
        done = RunDirectory.open(tmp_path / name)
        return {**done.read_adapter("trunk"), **done.read_adapter("client")}

    own: dict[str, Scalar] = {"trunk__step_every": "server-round"}
    changes: tuple[dict[str, Scalar], ...] = (
        {**own, "lora__trunk__r": 2, "seed": 1},
        {**own, "lora__trunk__target_modules": "up_proj", "trunk__optimizer__name": "adamw"},
    )
    beside = parse_run_config(tiny_config(model, data, lora__trunk__r=6, seed=9))
    with monkeypatch.context() as patched:
        patched.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
        expected = [train(f"alone-{i}", **one) for i, one in enumerate(changes)]
    expected_beside = alone("beside", beside)
    base = parse_run_config(tiny_config(model, data, trunk__max_experiments=2))
    serving = Serving(token=TOKEN, checkpoints=str(tmp_path / "checkpoints"))
    with RunningTrunk(base, serving) as trunk:
        job = Job("beside", beside, trunk.port)
        job.run((1,))
        there: dict[str, Scalar] = {
            "trunk__address": f"127.0.0.1:{trunk.port}",
            "trunk__token_file": str(token),
        }
        found = [train(f"shared-{i}", **one, **there) for i, one in enumerate(changes)]
        assert job.run((2,)) == expected_beside
        with closing(TrunkCoordinator(f"127.0.0.1:{trunk.port}", TOKEN)) as operator:
            status = operator.status()
    assert [item.name for item in status.experiments] == ["beside"]  # the runs have left
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_run_over_another_base_is_refused_before_any_client_is_asked(tmp_path: Path) -> None:
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", 2)
    base = parse_run_config(tiny_config(model, data, trunk__max_experiments=2))
    other = parse_run_config(tiny_config(model, data, model__dtype="bfloat16"))
    with several(base, tmp_path / "checkpoints") as trunk, closing(trunk.coordinator()) as link:
        with pytest.raises(ConfigError, match=r"they differ in dtype \(run: bfloat16"):
            check_settings(other, link.status(), of_base=True)
