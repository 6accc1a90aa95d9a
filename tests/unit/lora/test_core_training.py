"""Training of the core R of B = P R, against R written out by hand as a parameter of its own."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flower_split.aggregation import make_aggregator
from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterUpdate
from flower_split.errors import SplitError
from flower_split.lora import adapter_state, load_adapter_state, lora_scales, set_trainable
from flower_split.lora.base_change import set_base_change
from flower_split.lora.core_training import core_columns_state, trained_cores

IN, OUT, RANK = 12, 10, 3


class Tiny(nn.Module):
    """One adapted linear layer, and one that is not."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(IN, OUT)
        self.second = nn.Linear(OUT, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def tiny(seed=0):
    torch.manual_seed(seed)
    model = Tiny().double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["first"])
    inject_adapter_in_model(config, model)
    return model.double()


def data(seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(16, IN, generator=rng, dtype=torch.float64)
    return x, torch.sin(x.sum(dim=1, keepdim=True))


def step_model(model, seed, steps, optimizer=torch.optim.AdamW):
    """Steps on everything that requires grad; returns the names of what that was."""
    x, y = data(seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizer(trained.values(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return trained


def orthonormal():
    rng = torch.Generator().manual_seed(3)
    p = torch.linalg.qr(torch.randn(OUT, RANK, generator=rng, dtype=torch.float64)).Q
    q = torch.linalg.qr(torch.randn(IN, RANK, generator=rng, dtype=torch.float64)).Q.T
    core = torch.randn(RANK, RANK, generator=rng, dtype=torch.float64)
    return p, core, q.contiguous()


def test_client_trains_the_core_alone_exactly_as_a_parameter_of_its_own():
    p, core, q = orthonormal()
    model = tiny()
    layer = model.first
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(q)
        layer.lora_B["default"].weight.copy_(p @ core)
    b = layer.lora_B["default"].weight
    set_trainable(model, ["first.lora_B.weight"])
    with trained_cores(model, core_columns_state({"first": p})):
        trained = step_model(model, 1, 20)
        assert [tuple(one.shape) for one in trained.values()] == [(RANK, RANK)]
    # By hand: W + s P R Q with R a leaf, the same optimizer.
    x, y = data(1)
    own = core.clone().requires_grad_()
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    optimizer = torch.optim.AdamW([own], lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        hidden = x @ (weight + 2.0 * p @ own @ q).T + bias
        (model.second(torch.tanh(hidden)) - y).square().mean().backward()
        optimizer.step()
    assert layer.lora_B["default"].weight is b
    b, own = b.detach(), own.detach()
    assert float((b - p @ own).norm() / (p @ own).norm()) < 1e-10
    assert float((own - core).norm()) > 0.1
    assert torch.equal(layer.lora_A["default"].weight, q)
    assert list(adapter_state(model)) == ["first.lora_A.weight", "first.lora_B.weight"]


def test_b_trained_instead_of_its_core_ends_elsewhere():
    p, core, q = orthonormal()
    found = []
    for columns in ({"first": p}, {}):
        model = tiny()
        with torch.no_grad():
            model.first.lora_A["default"].weight.copy_(q)
            model.first.lora_B["default"].weight.copy_(p @ core)
        set_trainable(model, ["first.lora_B.weight"])
        with trained_cores(model, core_columns_state(columns)):
            step_model(model, 1, 20)
        found.append(model.first.lora_B["default"].weight.detach())
    assert float((found[0] - found[1]).norm() / (found[0] - p @ core).norm()) > 0.3


def test_rounds_of_fed_sb_train_b_then_a_then_the_core_and_move_the_loss():
    model = tiny()
    aggregator = AdapterAggregator(make_aggregator("fed-sb"), lora_scales(model))
    aggregator.init(adapter_state(model))
    losses, sides = [], []
    for _ in range(6):
        sent, columns = aggregator.distribute(), core_columns_state(aggregator.core_columns())
        load_adapter_state(model, sent)
        x, y = data(0)
        losses.append((model(x) - y).square().mean().item())
        updates = []
        for index in range(3):
            load_adapter_state(model, sent)
            set_base_change(model, columns)  # they travel together; columns change no weight
            set_trainable(model, aggregator.trainable())
            with trained_cores(model, columns):
                trained = step_model(model, index, 10)
                shapes = [tuple(one.shape) for one in trained.values()]
            updates.append(AdapterUpdate(index, sent, adapter_state(model), 1.0))
        sides.append(shapes)
        aggregator.aggregate(updates)
    assert sides == [[(OUT, RANK)], [(RANK, IN)], *([[(RANK, RANK)]] * 4)]
    assert losses[-1] < losses[0]


def test_columns_that_do_not_fit_are_refused_and_the_model_stays_as_it_was():
    model = tiny()
    with (
        pytest.raises(SplitError, match="core_P is .* but B of first"),
        trained_cores(model, core_columns_state({"first": torch.zeros(OUT, RANK + 1)})),
    ):
        pass
    with (
        pytest.raises(SplitError, match="elsewhere is none"),
        trained_cores(model, core_columns_state({"elsewhere": torch.zeros(OUT, RANK)})),
    ):
        pass
    assert len(adapter_state(model)) == 2
