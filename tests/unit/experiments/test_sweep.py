"""Sweeps: what runs, what is found finished, what is refused; the runs themselves are stand-ins."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flower_split.config import run_config_keys
from flower_split.errors import ConfigError, FlowerSplitError, RunDirectoryError
from flower_split.experiments import sweep as module
from flower_split.experiments.grid import parse_grid
from flower_split.experiments.sweep import Sweep, check_sweep, outcomes, run_sweep
from flower_split.local.job import LocalJob
from flower_split.local.process import Output
from flower_split.runs.directory import RunDirectory
from flower_split.runs.files import write_json


class AtOnce:
    """Does the work where it is started."""

    def __init__(self, code: int) -> None:
        self.exit_code = code

    @classmethod
    def start(cls, work: Callable[[], None], output: Output) -> "AtOnce":
        try:
            work()
        except FlowerSplitError:
            return cls(1)
        return cls(0)

    def wait(self, seconds: float) -> bool:
        return True


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs, in the order in which they ran."""
    names: list[str] = []

    def finish(config: object, name: str) -> None:
        names.append(name)
        if name in broken:
            raise ConfigError("broken")
        path = Path(str(config))
        write_json(path / "summary.json", {})

    def run_job(job: LocalJob) -> None:
        config = module.parse_run_config(job.run_config)
        directory = RunDirectory.create(config)
        finish(directory.path, directory.path.name)

    def run_baseline(name: str, config: module.RunConfig) -> None:
        directory = RunDirectory.create(config)
        finish(directory.path, directory.path.name)

    broken.clear()
    monkeypatch.setattr(module, "RunProcess", AtOnce)
    monkeypatch.setattr(module, "run_job", run_job)
    monkeypatch.setattr(module, "run_baseline", run_baseline)
    return names


broken: set[str] = set()


def sweep_of(out: Path, grid: str = "mode=joint,frozen seed=0,1") -> Sweep:
    app = LocalJob(folder=out, server_app="s:app", client_app="c:app", run_config=run_config_keys())
    return Sweep(
        app=app, axes=parse_grid(grid), baselines=("central",), out=out, say=lambda text: None
    )


def test_sweep_runs_one_seed_after_the_other_and_then_nothing(
    tmp_path: Path, ran: list[str]
) -> None:
    sweep = sweep_of(tmp_path)
    check_sweep(sweep)
    assert run_sweep(sweep) == []
    assert ran == [
        "ours_mode=joint_seed=0", "ours_mode=frozen_seed=0", "central_seed=0",
        "ours_mode=joint_seed=1", "ours_mode=frozen_seed=1", "central_seed=1",
    ]  # fmt: skip
    assert [path.name for path in outcomes(sweep).values()] == [
        "ours_mode=joint_seed=0", "ours_mode=joint_seed=1", "ours_mode=frozen_seed=0",
        "ours_mode=frozen_seed=1", "central_seed=0", "central_seed=1",
    ]  # fmt: skip
    ran.clear()
    check_sweep(sweep)
    assert run_sweep(sweep) == [] and ran == []


def test_sweep_goes_on_after_a_run_that_failed_and_runs_it_again(
    tmp_path: Path, ran: list[str]
) -> None:
    sweep = sweep_of(tmp_path)
    broken.add("ours_mode=joint_seed=0")
    assert [cell.name for cell in run_sweep(sweep)] == ["ours_mode=joint_seed=0"]
    assert len(ran) == 6 and len(outcomes(sweep)) == 5
    broken.clear()
    ran.clear()
    assert run_sweep(sweep) == [] and ran == ["ours_mode=joint_seed=0"]


def test_sweep_with_more_values_runs_what_is_new(tmp_path: Path, ran: list[str]) -> None:
    run_sweep(sweep_of(tmp_path))
    ran.clear()
    run_sweep(sweep_of(tmp_path, "mode=joint,frozen seed=0,1,2"))
    assert ran == ["ours_mode=joint_seed=2", "ours_mode=frozen_seed=2", "central_seed=2"]


def test_sweep_refuses_a_directory_of_another_configuration(tmp_path: Path, ran: list[str]) -> None:
    sweep = sweep_of(tmp_path)
    run_sweep(sweep)
    other = replace(sweep.app, run_config={**sweep.app.run_config, "train.batch-size": 3})
    with pytest.raises(RunDirectoryError, match=r"train\.batch-size = 8, and this sweep has 3"):
        check_sweep(replace(sweep, app=other))


def test_sweep_takes_a_run_that_had_other_deadlines(tmp_path: Path, ran: list[str]) -> None:
    sweep = sweep_of(tmp_path)
    run_sweep(sweep)
    ran.clear()
    patient = replace(sweep.app, run_config={**sweep.app.run_config, "join-timeout": 900.0})
    check_sweep(replace(sweep, app=patient))
    assert run_sweep(replace(sweep, app=patient)) == [] and ran == []
    longer = replace(sweep.app, run_config={**sweep.app.run_config, "num-server-rounds": 9})
    with pytest.raises(RunDirectoryError, match="num-server-rounds"):
        check_sweep(replace(sweep, app=longer))


def test_sweep_refuses_a_combination_before_anything_runs(tmp_path: Path, ran: list[str]) -> None:
    sweep = sweep_of(tmp_path, "fraction-train=1.0,0.5")
    with pytest.raises(ConfigError, match=r"central_fraction-train=0\.5 .* fraction-train is 0\.5"):
        check_sweep(sweep)
    assert ran == []


def test_sweep_stops_when_it_is_told_to(tmp_path: Path, ran: list[str]) -> None:
    sweep = sweep_of(tmp_path)
    run_sweep(sweep, stopped=lambda: len(ran) == 2)
    assert len(ran) == 2
