"""When clients keep their optimizer, and when their number scales their learning rate."""

import pytest

from flower_split.config import Scalar, parse_run_config
from flower_split.errors import ConfigError

FEDIT: dict[str, Scalar] = {"strategy.aggregator": "fedit"}


@pytest.mark.parametrize(
    ("settings", "keeps", "scales"),
    [
        (FEDIT, True, True),
        ({"strategy.aggregator": "ffa-lora"}, True, True),
        (FEDIT | {"train.optimizer.name": "adam"}, True, True),
        ({"strategy.aggregator": "product-delta"}, False, False),  # its factors are new every round
        (FEDIT | {"train.optimizer.name": "sgd"}, True, False),  # averaging SGD's steps is linear
        (FEDIT | {"train.optimizer-state": "reset"}, False, False),
        (FEDIT | {"train.rate-scale": "none"}, True, False),
        (FEDIT | {"train.sync": "gradients"}, True, False),  # one step, with the mean gradient
        (FEDIT | {"strategy.name": "fedavg"}, False, False),
        ({"strategy.aggregator": "product-delta", "train.optimizer-state": "keep"}, True, False),
        (
            FEDIT | {"train.optimizer-state": "reset", "train.rate-scale": "sqrt-clients"},
            False,
            True,
        ),
    ],
)
def test_auto_keeps_and_scales_where_factors_are_averaged(
    settings: dict[str, Scalar], keeps: bool, scales: bool
) -> None:
    config = parse_run_config(settings)
    assert (config.keeps_optimizer, config.scales_client_rate) == (keeps, scales)


@pytest.mark.parametrize(
    "settings",
    [
        {"train.optimizer.name": "sgd"},
        {"train.sync": "gradients", "strategy.aggregator": "fedit"},
        {"strategy.name": "fedavg", "strategy.aggregator": "fedit"},
    ],
)
def test_scaling_where_it_means_nothing_is_refused(settings: dict[str, Scalar]) -> None:
    with pytest.raises(ConfigError, match="train.rate-scale"):
        parse_run_config({"train.rate-scale": "sqrt-clients", **settings})
