"""Settings that cannot go together; every row is broken once by hand, and all problems are told."""

import pytest

from flower_split.config import Scalar, parse_run_config
from flower_split.config.combinations import (
    ALWAYS,
    NAMED_STRATEGY,
    check_named_strategy,
    combinations_table,
)
from flower_split.errors import ConfigError

FEDBUFF: dict[str, Scalar] = {"strategy.name": "fedbuff", "trunk.step-every": "server-round"}
OVER_MODEL: dict[str, Scalar] = {"train.max-grad-norm-over": "model"}
SHARED: dict[str, Scalar] = {"train.sync": "gradients", "strategy.aggregator": "fedit"}
CENTRAL: dict[str, Scalar] = {
    "privacy.mechanism": "server-fixed",
    "strategy.name": "fedavg",
    "strategy.weighting": "uniform",
}
BATCHES: dict[str, Scalar] = {"trunk.window-batches": "on"}
BROKEN_ALWAYS: list[tuple[dict[str, Scalar], str]] = [
    ({"resume-previous": True}, r"resume-previous = true with resume = \"\": there is no run dir"),
    (
        {"early-stopping.metric": "eval-loss", "fraction-evaluate": 0.0},
        'early-stopping.metric = "eval-loss" with fraction-evaluate = 0.0',
    ),
    ({"train.auxiliary-head": True}, r'train.auxiliary-head = true with mode = "joint"'),
    (
        {"train.auxiliary-head": True, "mode": "forward-only", "model.task": "masked-lm"},
        "predicts the next token",
    ),
    ({"local-only-baseline": True, "trunk.train": "full"}, "it would be no baseline"),
    ({"lora.trunk.r": 0}, r"nothing of it would train. Set lora.trunk.r"),
    (OVER_MODEL | {"trunk.step-every": "server-round"}, "all three gradients at the same step"),
    (OVER_MODEL | {"trunk.optimizer.max-grad-norm": 0.5}, "is clipped to one value"),
    (OVER_MODEL | {"trunk.reduction": "trimmed-mean=0.2"}, "scales everybody's step"),
    (SHARED | {"trunk.step-every": "server-round"}, "at the end of every step"),
    (SHARED | {"fraction-train": 0.5, "trunk.quorum": 0.5}, "fraction-train = 0.5 with trunk.quo"),
    (SHARED | {"lora.rank-by-partition": "0=2"}, "the same parameters on every client"),
    (SHARED | {"privacy.mechanism": "local"}, "sees every client's gradient as it is"),
    (SHARED | {"strategy.aggregator": "product-delta"}, "must leave it as it is"),
    (BATCHES | {"trunk.step-every": "server-round"}, "there they need not run at once"),
    (BATCHES | {"trunk.reduction": "median"}, 'window-batches = "on" with trunk.reduction = "med'),
    (
        {
            "train.optimizer-state": "keep",
            "strategy.name": "fedavg",
            "strategy.aggregator": "fedit",
        },
        "does not tell a client which",
    ),
    (
        {"train.rate-scale": "sqrt-clients", "train.optimizer.name": "sgd"},
        "makes up for Adam's steps",
    ),
    ({"lora.bottom.r": 0, "lora.top.r": 0}, "a client would have nothing to train"),
    (
        {"train.auxiliary-head": True, "mode": "forward-only", "lora.top.modules-to-save": "x"},
        "frozen output embedding",
    ),
    ({"privacy.mechanism": "local", "local-only-baseline": True}, "without clipping or noise"),
    ({"strategy.concurrency": 3}, 'strategy.name = "lora-fedavg" with strategy.concurrency = 3'),
    (FEDBUFF | {"trunk.step-every": "local-step"}, 'trunk.step-every = "local-step"'),
    (FEDBUFF | {"trunk.window-rule": "mine"}, "no window that somebody could leave"),
    (FEDBUFF | {"strategy.aggregator": "fedit"}, "back to old versions"),
    (FEDBUFF | {"fraction-train": 0.5}, "fraction-train = 0.5: its clients are not sampled"),
    (FEDBUFF | {"privacy.mechanism": "local"}, "every client takes part once"),
    (FEDBUFF | {"strategy.rules": "uniform, krum=1"}, "one client of all"),
]
BROKEN_NAMED: list[tuple[dict[str, Scalar], str]] = [
    ({"strategy.name": "fedavg", "strategy.max-rank": 4}, "strategy.max-rank = 4: the key is of"),
    ({"strategy.name": "fedavg", "strategy.aggregator": "flora"}, "would not be used"),
    (CENTRAL | {"strategy.name": "lora-fedavg"}, "without that noise"),
    (CENTRAL | {"strategy.name": "fedadam"}, "plain mean"),
    (CENTRAL | {"strategy.weighting": "tokens"}, "equal weight"),
    (CENTRAL | {"resume": "run", "resume-previous": True}, "spent twice"),
]


@pytest.mark.parametrize(("settings", "words"), BROKEN_ALWAYS)
def test_settings_that_never_go_together_are_refused(
    settings: dict[str, Scalar], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_run_config(settings)


@pytest.mark.parametrize(("settings", "words"), BROKEN_NAMED)
def test_settings_that_the_named_strategy_cannot_have_are_refused(
    settings: dict[str, Scalar], words: str
) -> None:
    config = parse_run_config(settings)
    with pytest.raises(ConfigError, match=words):
        check_named_strategy(config)


def test_every_row_is_broken_by_a_case_of_this_file() -> None:
    assert (len(BROKEN_ALWAYS), len(BROKEN_NAMED)) == (len(ALWAYS), len(NAMED_STRATEGY))


@pytest.mark.parametrize(
    "settings",
    [{}, FEDBUFF, OVER_MODEL, SHARED, SHARED | OVER_MODEL, CENTRAL, {"strategy.name": "fedadam"}],
)
def test_settings_that_go_together_pass(settings: dict[str, Scalar]) -> None:
    check_named_strategy(parse_run_config(settings))


def test_all_problems_are_told_at_once() -> None:
    settings = FEDBUFF | {
        "fraction-train": 0.5,
        "strategy.aggregator": "fedit",
        "resume-previous": True,
    }
    with pytest.raises(ConfigError) as refusal:
        parse_run_config(settings)
    message = str(refusal.value)
    assert message.startswith("the run config has 3 problems: (1) ")
    assert "resume-previous" in message and "fraction-train" in message and "fedit" in message


def test_the_table_has_a_row_for_each_combination() -> None:
    head, rule, *rows = combinations_table().splitlines()
    assert head == "| settings | why not | instead |" and rule == "|---|---|---|"
    assert len(rows) == 34
    assert all(row.count("|") == 4 for row in rows)
    assert (
        "| `fedbuff` with `fraction-train` below 1 | its clients are not sampled by round | Set "
        "strategy.concurrency, and leave fraction-train at 1.0 |"
    ) in rows
