"""Compilation before the first round: which shapes run, and that nothing of the trunk changes."""

import logging

import pytest
import torch
from torch import Tensor

from flower_split.config import LoraPartConfig, OptimizerConfig
from flower_split.lora import attach_lora
from flower_split.split import CutLayers, split_model
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.warm_up import warm_up
from tests.unit.split.test_compute_mode import make

CUTS = CutLayers(1, 3)


def trunk_compute(*, fused: bool = False) -> TrunkCompute:
    _, trunk = split_model(make(torch.float32), CUTS)
    trunk.requires_grad_(False)
    attach_lora(trunk, CUTS, {"trunk": LoraPartConfig(r=2, alpha=4.0)}, seed=0)
    return TrunkCompute(trunk, OptimizerConfig(learning_rate=0.1), seed=0, fused=fused)


def test_warm_up_runs_both_lengths_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    compute = trunk_compute()
    shapes: list[tuple[int, ...]] = []
    backwards: list[int] = []
    layer = compute.trunk.stack.layers(compute.trunk)[1]

    def note(_module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        shapes.append(tuple(hidden.shape))
        hidden.register_hook(lambda _: backwards.append(hidden.shape[1]))

    layer.register_forward_pre_hook(note, with_kwargs=True)
    before = {name: tensor.clone() for name, tensor in compute.adapter().items()}
    random_state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        seconds = warm_up(compute, 32, 2, 6)
    assert shapes == [(2, 6, 32), (2, 3, 32)]
    assert backwards == [6, 3]
    assert seconds > 0 and "2 x 6 positions" in caplog.text
    assert compute.version == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    after = compute.adapter()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_fused_optimizer_takes_the_step_of_the_plain_one() -> None:
    plain, fused = trunk_compute(), trunk_compute(fused=True)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) for p in plain.parameters]
    for compute in (plain, fused):
        compute.plan(2)
        compute.step(gradients)
        compute.step(gradients)
    theirs = fused.adapter()
    for name, value in plain.adapter().items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-6)
