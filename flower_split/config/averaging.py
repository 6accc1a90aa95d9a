"""How clients train where what is averaged are their own optimizer steps, not their gradients."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # run.py checks itself against what is here
    from flower_split.config.run import RunConfig

AVERAGES_FACTORS = ("fedit", "ffa-lora")
"""Aggregators that average A and B entry by entry, so that a moment stays that of its entry."""


def averages_factors(config: "RunConfig") -> bool:
    """Return whether the factors that a client gets back are averages of the factors that it sent."""
    strategy = config.strategy
    return strategy.name == "lora-fedavg" and strategy.aggregator in AVERAGES_FACTORS


def why_rate_as_it_is(config: "RunConfig") -> str:
    """Say what keeps the clients' learning rate from growing with their number; empty: nothing does.

    Adam divides a step by the root of the squared gradient's mean, which noise of a client's small batch
    enlarges. K clients' averaged steps are therefore up to √K shorter than the step that Adam takes
    with the mean of their gradients: the square-root rule of Malladi et al., "On the SDEs and Scaling
    Rules for Adaptive Gradient Algorithms", NeurIPS 2022 (arXiv 2205.10287), read backwards.
    """
    if config.strategy.name != "lora-fedavg":
        return "no strategy but lora-fedavg tells a client how many are averaged with it"
    if config.shares_gradients:
        return "with train.sync = gradients every client steps with the mean of all gradients"
    if config.train.optimizer.name == "sgd":
        return "the average of steps of SGD is the step of the average, at any number of clients"
    return ""
