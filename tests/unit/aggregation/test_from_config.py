"""What a run config makes of the aggregation, and what it refuses before a run begins."""

import logging

import pytest

from flower_split.aggregation import METHODS
from flower_split.aggregation.core.client_updates import AdapterSpec
from flower_split.aggregation.from_config import (
    adapter_aggregator,
    check_clients,
    check_strategy,
    parse_options,
)
from flower_split.aggregation.methods.florist import FLoRIST
from flower_split.aggregation.methods.lora_fair import LoRAFair
from flower_split.aggregation.methods.product_delta import ProductDelta
from flower_split.config import StrategyConfig, parse_run_config
from flower_split.errors import AggregationError, ConfigError, FlowerSplitError

PRODUCT = {"product-delta", "flexlora", "florist"}


def config(**changes):
    return StrategyConfig(**changes)


def test_defaults_are_the_plain_method():
    for name in METHODS:
        assert check_strategy(config(aggregator=name)) == METHODS[name]()


def test_every_key_reaches_the_method():
    method = check_strategy(
        parse_run_config(
            {
                "strategy.aggregator": "florist",
                "strategy.options": "tau=0.75, working-rank=32",
                "strategy.max-rank": 12,
                "strategy.server-learning-rate": 0.01,
                "strategy.server-optimizer": "yogi",
                "strategy.server-beta1": 0.8,
                "strategy.server-beta2": 0.9,
                "strategy.server-epsilon": 0.02,
            }
        ).strategy
    )
    assert method == FLoRIST(
        tau=0.75,
        working_rank=32,
        max_rank=12,
        learning_rate=0.01,
        server_optimizer="yogi",
        beta1=0.8,
        beta2=0.9,
        epsilon=0.02,
    )


def test_options_are_of_the_types_of_the_methods_fields():
    assert parse_options("lora-fair", " penalty = 1 , seed=7") == {"penalty": 1.0, "seed": 7}
    assert check_strategy(config(aggregator="lora-fair", options="penalty=1")) == LoRAFair(
        penalty=1
    )
    assert check_strategy(config(server_optimizer="momentum")) == ProductDelta(
        server_optimizer="momentum"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregator": "florists"}, "Did you mean 'florist'"),
        ({"options": "tau=0.9"}, "none of product-delta's options, which are .*working_rank"),
        ({"aggregator": "florist", "options": "tau"}, "must read"),
        ({"aggregator": "florist", "options": "tau=0.9, tau=0.8"}, "each name once"),
        ({"aggregator": "florist", "options": "tau=high"}, "tau must be float; it is 'high'"),
        ({"aggregator": "florist", "options": "tau=1.5"}, r"tau must be in \(0, 1\]"),
        ({"options": "working-rank=4.5"}, "working-rank must be int"),
        ({"options": "max-rank=4"}, "which is strategy.max-rank"),
        ({"options": "beta1=0.5"}, "which is strategy.server-beta1"),
        ({"server_beta1": 0.5}, "strategy.server-beta1 is 0.5, but strategy.server-optimizer"),
        ({"server_optimizer": "sgd"}, "must be one of none, momentum, adam"),
        ({"server_optimizer": "adam", "server_beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"rules": "krumm=1"}, "krumm"),
        ({"rules": "median, multi-krum=1"}, "multi-krum after median"),
        ({"rules": "krum=1, uniform"}, "uniform after krum"),
        ({"aggregator": "hetlora", "rules": "clamp-weights=3"}, "size of their ΔW"),
        ({"aggregator": "hetlora", "rules": "uniform"}, "size of their ΔW"),
        ({"aggregator": "fedsa-lora", "rules": "multi-krum=1"}, "B stays with each client"),
        ({"aggregator": "fedsa-lora", "rules": "norm-clipping=1"}, "B stays with each client"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused_with_the_reason(changes, words):
    with pytest.raises(AggregationError, match=words):
        check_strategy(config(**changes))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_server_optimizer_and_maximum_rank_are_refused_where_they_mean_nothing(name):
    if name in PRODUCT:
        check_strategy(config(aggregator=name, server_optimizer="adam", max_rank=3))
        return
    with pytest.raises(AggregationError, match=f"{name} takes no server optimizer.*product-delta"):
        check_strategy(config(aggregator=name, server_optimizer="adam"))
    if name == "raflora":
        check_strategy(config(aggregator=name, max_rank=3))
        return
    with pytest.raises(AggregationError, match=f"strategy.max-rank is 3, but {name} keeps no"):
        check_strategy(config(aggregator=name, max_rank=3))


@pytest.mark.parametrize(
    "changes", [{"on_invalid": "ignore"}, {"max_rank": -1}, {"server_learning_rate": 0.0}]
)
def test_values_out_of_range_are_refused_by_key(changes):
    key = "strategy." + next(iter(changes)).replace("_", "-")
    with pytest.raises(ConfigError, match=key):
        config(**changes)


def test_adaptive_optimizer_at_rate_one_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="flower_split"):
        check_strategy(config(server_optimizer="momentum"))
        assert not caplog.records
        check_strategy(config(server_optimizer="adam"))
    assert "moves every entry" in caplog.text


def test_device_that_is_not_there_is_refused_by_key():
    with pytest.raises(ConfigError, match="strategy.device"):
        adapter_aggregator(config(device="cuda:77"), {"m": 1})


def test_aggregator_has_the_rules_and_the_policy():
    given = config(rules="clamp-weights=2", on_invalid="exclude", num_threads=3)
    aggregator = adapter_aggregator(given, {"m": 1})
    assert aggregator._workers == 3 and str(aggregator._device) == "cpu"
    assert aggregator.method == ProductDelta()
    assert [type(rule).__name__ for rule in aggregator._transforms] == ["ClampWeights"]
    assert aggregator._exclude


@pytest.mark.parametrize(
    ("rules", "specs", "participants", "words"),
    [
        ("trimmed-mean=0.2", {3: AdapterSpec(ranks=2), 1: AdapterSpec(scales={"m": 1.0})}, 9,
         "trimmed-mean, which compares factors entry by entry.*partitions 1, 3"),
        ("median", {2: AdapterSpec(ranks={"m": 4})}, 9, "median.*partitions 2"),
        ("multi-krum=1", {2: AdapterSpec(modules=frozenset({"m"}))}, 9, "partitions 2 hold only"),
        ("norm-clipping=1, krum=2", {}, 6, "at least 7 clients in a round; 6 take part"),
    ],
)  # fmt: skip
def test_rules_that_cannot_work_on_these_clients_are_refused(rules, specs, participants, words):
    with pytest.raises(AggregationError, match=words):
        check_clients(config(rules=rules), specs, participants)


def test_rules_that_can_work_on_these_clients_pass():
    ranks = {0: AdapterSpec(ranks=2)}
    parts = {0: AdapterSpec(modules=frozenset({"m"}))}
    check_clients(config(rules="norm-clipping=1, multi-krum=1"), ranks, 5)
    check_clients(config(rules="norm-clipping=1, median"), parts, 1)


def test_errors_are_of_this_packages_tree():
    assert issubclass(AggregationError, FlowerSplitError)
