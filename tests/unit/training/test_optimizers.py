"""Optimizers step with torch's own bits."""

import pytest
import torch
from torch import nn

from flower_split.config import OptimizerConfig
from flower_split.training.optimizers import make_optimizer

SHAPES = ((8, 128), (128, 8), (3,), (64, 8), (8, 352))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)],
)
def test_optimizer_has_the_bits_of_torchs_loop_over_parameters(
    name: str, kind: type[torch.optim.Optimizer], decay: float
) -> None:
    mine, theirs = parameters(), parameters()
    config = OptimizerConfig(name=name, learning_rate=0.016, weight_decay=decay)
    optimizer = make_optimizer(mine, config)
    reference = kind(theirs, lr=0.016, weight_decay=decay, foreach=False)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            scale = 10.0 ** (index - 4)
            one.grad = other.grad = None  # as a parameter has that no token reached
            if (step + index) % 4:
                one.grad = scale * torch.randn(one.shape, generator=generator)
                other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)
