"""What ``flower-split sweep`` makes of its command line and of a sweep's file."""

from collections import Counter
from pathlib import Path

import pytest

from flower_split.cli import preflight
from flower_split.cli.sweep import SweepCommand, prepare
from flower_split.errors import ConfigError
from flower_split.experiments.sweep import check_sweep
from tests.support.documentation import ROOT

BASELINES = ROOT / "simulations" / "baselines" / "sweep.toml"


def test_sweep_of_the_baselines_compares_three_modes_over_three_seeds(tmp_path: Path) -> None:
    sweep = prepare(SweepCommand(what=BASELINES, out=Path("out")), tmp_path)
    check_sweep(sweep)
    assert Counter(cell.baseline for cell in sweep.cells) == {
        "": 15, "central": 3, "alone": 3, "federated": 3, "sequential": 3, "splitfed-v2": 3
    }  # fmt: skip
    assert {cell.seed for cell in sweep.cells} == {0, 1, 2}
    modes = Counter(
        (sweep.config(cell).mode, sweep.config(cell).train) for cell in sweep.cells[:15]
    )
    assert set(modes.values()) == {3}
    assert [(mode, train.auxiliary_head, train.sync) for mode, train in modes] == [
        ("joint", False, "rounds"),
        ("frozen", False, "rounds"),
        ("forward-only", False, "rounds"),
        ("forward-only", True, "rounds"),
        ("joint", False, "gradients"),
    ]
    config = sweep.config(sweep.cells[0])
    assert (config.mode, config.evaluate_every, config.data.max_eval_batches) == ("joint", 12, 8)
    assert config.num_server_rounds == 12 and config.train.local_steps == 5  # the quick-start's
    assert sweep.out == tmp_path / "out" and config.run_dir.startswith(str(sweep.out))


@pytest.mark.parametrize("path", sorted((ROOT / "simulations").glob("*/sweep.toml")), ids=str)
def test_every_sweep_of_the_repository_can_be_run_and_says_how(path: Path, tmp_path: Path) -> None:
    sweep = prepare(SweepCommand(what=path, out=Path("out")), tmp_path)
    check_sweep(sweep)
    seeds = [cell.seed for cell in sweep.cells]
    assert set(seeds) == {0, 1, 2} and len(seeds) == 3 * seeds.count(0) > 3
    text = (path.parent / "README.md").read_text(encoding="utf-8")
    command = f"flower-split sweep simulations/{path.parent.name}/sweep.toml --out"
    assert command in text
    for cell in sweep.cells:
        config = sweep.config(cell)
        if cell.seed == 0 and config.lora.rank_by_partition:
            adapter, scales = preflight.check_model(config)
            preflight.check_clients(config, adapter, scales, f"num-supernodes={config.num_clients}")
    question = path.read_text(encoding="utf-8").splitlines()[0]
    assert question.startswith("# ") and question.endswith("?")


def test_options_of_the_command_come_before_the_file(tmp_path: Path) -> None:
    command = SweepCommand(
        what=BASELINES, out=tmp_path, grid="seed=5,6", baselines="", run_config=["evaluate-every=3"]
    )
    sweep = prepare(command, tmp_path)
    assert [cell.name for cell in sweep.cells] == ["ours_seed=5", "ours_seed=6"]
    assert sweep.config(sweep.cells[0]).evaluate_every == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("app = 1", "must have app"),
        ('app = "../x"\ngird = {}', "it has gird"),
        ('app = "APP"\n[grid]\nseed = 1', r"grid\.seed must be a list of values"),
        ('app = "APP"\n[grid]\nsed = [1]', "Did you mean 'seed'"),
        ('app = "APP"\nbaselines = ["x"]\n[grid]\nseed = [1]', "'x' is none"),
        ('app = "APP"', "a sweep needs a grid"),
        ("app =", "cannot be read"),
    ],
)
def test_sweep_file_that_is_wrong_is_told(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(text.replace("APP", str(ROOT / "simulations" / "quickstart")))
    with pytest.raises(ConfigError, match=words):
        check_sweep(prepare(SweepCommand(what=path, out=tmp_path / "out"), tmp_path))
