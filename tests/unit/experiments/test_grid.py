"""Grids: keys with several values, and the runs and baselines that they make."""

import pytest

from flower_split.errors import ConfigError
from flower_split.experiments.grid import Cell, cells_of, config_of, parse_grid


def test_grid_reads_values_by_the_type_of_their_key() -> None:
    axes = parse_grid("seed=0,1 mode=joint,frozen train.optimizer.learning-rate=0.1,1e-3")
    assert axes == {
        "seed": (0, 1),
        "mode": ("joint", "frozen"),
        "train.optimizer.learning-rate": (0.1, 0.001),
    }
    quoted = parse_grid("strategy.rules='','norm-clipping=1.0, trimmed-mean=0.2'")
    assert quoted == {"strategy.rules": ("", "norm-clipping=1.0, trimmed-mean=0.2")}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed=0,1 mode", "'mode'"),
        ("sed=0,1", "Did you mean 'seed'"),
        ("seed=0,1 seed=2", "seed twice"),
        ("seed=1,1", "a value twice"),
        ("mode=joint,frosen", "frosen"),
        ("seed=0,x", "seed has a value that cannot be read: x"),
    ],
)
def test_grid_that_is_wrong_is_told_by_key_and_value(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        list(cells_of(parse_grid(text), []))
        for cell in cells_of(parse_grid(text), []):
            from flower_split.config import parse_run_config

            parse_run_config(dict(cell.values))


def test_grid_is_every_combination_and_baselines_only_where_they_differ() -> None:
    axes = parse_grid("mode=joint,frozen strategy.aggregator=fedit,flora seed=0,1 num-clients=2,4")
    names = [cell.name for cell in cells_of(axes, ["central"])]
    assert len(names) == len(set(names)) == 2 * 2 * 2 * 2 + 2 * 2
    assert names[0] == "ours_mode=joint_strategy.aggregator=fedit_seed=0_num-clients=2"
    assert names[-4:] == [
        "central_seed=0_num-clients=2",
        "central_seed=0_num-clients=4",
        "central_seed=1_num-clients=2",
        "central_seed=1_num-clients=4",
    ]


def test_grid_gives_a_baseline_the_first_value_of_what_only_the_federation_has() -> None:
    axes = parse_grid("mode=joint,frozen trunk.optimizer.learning-rate=0.5,0.25 seed=3")
    cells = cells_of(axes, ["alone"])
    assert [dict(cell.values) for cell in cells if cell.baseline] == [
        {"trunk.optimizer.learning-rate": 0.5, "seed": 3},
        {"trunk.optimizer.learning-rate": 0.25, "seed": 3},
    ]
    config = config_of(cells[-1], axes, {"mode": "forward-only", "num-clients": 3})
    assert config == {
        "mode": "joint",
        "trunk.optimizer.learning-rate": 0.25,
        "seed": 3,
        "num-clients": 3,
    }


def test_cell_names_are_names_of_directories() -> None:
    cell = Cell((("data.path", "/a b/{partition_id}.jsonl"), ("seed", 1)))
    assert cell.name == "ours_data.path=-a-b-partition_id-.jsonl_seed=1"
