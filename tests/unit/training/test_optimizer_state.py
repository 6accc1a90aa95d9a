"""A part's optimizer that goes on from its state, by the names of its parameters."""

import pytest
import torch
from torch import nn

from flower_split.config import OptimizerConfig
from flower_split.errors import ConfigError
from flower_split.training.optimizers import PartOptimizer

NAMES = ["a", "b"]


def parameters(rows: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(rows, 3)), nn.Parameter(torch.ones(4))]


def step(optimizer: PartOptimizer, number: int) -> tuple[float, float]:
    for parameter in optimizer.parameters:
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    return optimizer.step(number)


def make(owned: list[nn.Parameter], *, norm: float = 1.0) -> PartOptimizer:
    config = OptimizerConfig(learning_rate=0.1, max_grad_norm=norm, schedule="linear")
    return PartOptimizer(owned, config, 4)


def test_two_optimizers_in_turn_are_one() -> None:
    alone = make(parameters())
    for number in range(4):
        step(alone, number)
    first = make(parameters())
    step(first, 0), step(first, 1)
    second = make(first.parameters)
    second.load_state(NAMES, first.state(NAMES))
    step(second, 2), step(second, 3)
    for found, expected in zip(second.parameters, alone.parameters, strict=True):
        assert torch.equal(found, expected)


def test_a_parameter_without_a_state_begins_anew_and_a_state_without_one_is_left() -> None:
    first = make(parameters())
    step(first, 0)
    state = {k: v for k, v in first.state(NAMES).items() if k.startswith("a/")}
    second = make(parameters())
    second.load_state(NAMES, {**state, "elsewhere/exp_avg": torch.ones(7)})
    assert set(second.state(NAMES)) == set(state)


def test_a_state_of_another_shape_is_refused() -> None:
    first = make(parameters())
    step(first, 0)
    with pytest.raises(ConfigError, match=r"a/exp_avg is \[2, 3\], and the parameter is \[5, 3\]"):
        make(parameters(rows=5)).load_state(NAMES, first.state(NAMES))


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_a_step_says_its_norm_before_clipping_and_its_rate(norm: float) -> None:
    found, rate = step(make(parameters(), norm=norm), 1)
    assert found == pytest.approx((10 * 2.0**2) ** 0.5)  # 10 entries of 2
    assert rate == pytest.approx(0.1 * 3 / 4)  # linear, to 0 at step 4
