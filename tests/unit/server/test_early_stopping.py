"""Early stopping by hand: which round is the last, told from records alone."""

import math

import pytest

from flower_split.config import RunConfig
from flower_split.config.early_stopping import EarlyStoppingConfig
from flower_split.errors import ConfigError
from flower_split.runs.files import Json
from flower_split.server.early_stopping import measurements, reason_to_stop


def lines(kind: str, **values: list[float | None]) -> list[dict[str, Json]]:
    [(name, found)] = values.items()
    made: list[dict[str, Json]] = []
    for server_round, value in enumerate(found):
        if value is not None:
            record = {"metrics": {name: value}} if kind == "central" else {name: value}
            made.append({"kind": kind, "server_round": server_round, **record})
    return made


def stop(config: EarlyStoppingConfig, records: list[dict[str, Json]], **now: float) -> str:
    return reason_to_stop(config, records, {int(key[1:]): value for key, value in now.items()})


def test_a_loss_that_falls_goes_on_and_one_that_stays_stops_after_its_patience() -> None:
    config = EarlyStoppingConfig(metric="eval-loss", patience=2)
    assert stop(config, lines("round", eval_loss=[4.0, 3.0, 2.0, 1.0])) == ""
    assert stop(config, lines("round", eval_loss=[4.0, 3.0, 3.0])) == ""
    why = stop(config, lines("round", eval_loss=[4.0, 3.0, 3.0, 3.5]))
    assert why == "eval-loss has not improved in 2 measurements since round 1 (3)"


def test_an_improvement_must_be_larger_than_min_delta_against_the_best() -> None:
    config = EarlyStoppingConfig(metric="train-loss", patience=3, min_delta=0.5)
    slowly = [4.0, 3.75, 3.5, 3.25]  # none is 0.5 below 4 but the last
    assert stop(config, lines("round", train_loss=slowly)) == ""
    assert "by more than 0.5 in 3 measurements since round 0" in stop(
        config, lines("round", train_loss=[4.0, 3.75, 3.5, 3.5])
    )


def test_rounds_without_a_measurement_do_not_count() -> None:
    config = EarlyStoppingConfig(metric="eval-loss", patience=2)
    records = lines("round", eval_loss=[4.0, None, 4.0, None])
    assert stop(config, records) == "" and measurements(config, records) == {0: 4.0, 2: 4.0}
    assert "since round 0" in stop(config, records, r4=4.5)


def test_what_is_not_yet_written_counts_and_nothing_counts_twice() -> None:
    config = EarlyStoppingConfig(metric="eval-loss", patience=1)
    assert stop(config, lines("round", eval_loss=[4.0]), r0=4.0) == ""
    assert "since round 0" in stop(config, lines("round", eval_loss=[4.0]), r1=4.0)


def test_a_metric_of_the_apps_own_may_be_one_that_grows() -> None:
    config = EarlyStoppingConfig(metric="central.accuracy", goal="max", patience=1)
    records = [*lines("central", accuracy=[0.25, 0.5]), *lines("round", accuracy=[9.0, 0.0])]
    assert stop(config, records) == ""
    assert "since round 1 (0.5)" in stop(config, records, r2=0.5)


def test_what_is_no_number_is_no_improvement() -> None:
    config = EarlyStoppingConfig(metric="train-loss", patience=2)
    records: list[dict[str, Json]] = [
        {"kind": "round", "server_round": number, "train_loss": value}
        for number, value in ((1, 3.0), (2, None), (3, None))
    ]
    assert math.isnan(measurements(config, records)[3])
    assert "in 2 measurements since round 1" in stop(config, records)


def test_without_a_metric_nothing_stops() -> None:
    assert stop(EarlyStoppingConfig(), lines("round", eval_loss=[1.0, 2.0, 3.0, 4.0, 5.0])) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": "precision"}, "central.NAME.*it is 'precision'"),
        ({"metric": "central."}, "central.NAME"),
        ({"goal": "less"}, "early-stopping.goal must be one of min, max"),
        ({"patience": 0}, "early-stopping.patience must be at least 1"),
        ({"min_delta": -1.0}, "early-stopping.min-delta must be at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EarlyStoppingConfig(**changes)  # type: ignore[arg-type]


def test_held_out_loss_needs_clients_that_evaluate() -> None:
    stopping = EarlyStoppingConfig(metric="eval-loss")
    with pytest.raises(ConfigError, match="early-stopping.metric .*fraction-evaluate"):
        RunConfig(early_stopping=stopping, fraction_evaluate=0.0)
