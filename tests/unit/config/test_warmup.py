"""A warm-up that the schedule would ignore is refused."""

import pytest

from flower_split.config import parse_run_config
from flower_split.errors import ConfigError


@pytest.mark.parametrize("who", ["train", "trunk"])
def test_warmup_of_a_constant_schedule_is_refused(who: str) -> None:
    with pytest.raises(ConfigError, match='does not warm up. Set .* "constant_with_warmup"'):
        parse_run_config({f"{who}.optimizer.warmup-ratio": 0.1})


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
def test_warmup_of_a_schedule_that_warms_up_passes(schedule: str) -> None:
    config = parse_run_config(
        {"train.optimizer.warmup-ratio": 0.1, "train.optimizer.schedule": schedule}
    )
    assert config.train.optimizer.warmup_ratio == 0.1
