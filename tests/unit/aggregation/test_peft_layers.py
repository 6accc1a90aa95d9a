"""The ΔW that is aggregated is the ΔW that PEFT adds to a layer's weight."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterUpdate
from flower_split.aggregation.core.adapter_layout import factors_from, layout_of


class Layers(nn.Module):
    """One layer of every kind that LoRA adapts."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.gpt2 = nn.Sequential(Conv1D(7, 6))
        self.embedding = nn.Embedding(11, 4)
        self.conv = nn.Conv2d(3, 4, kernel_size=(2, 3))


@pytest.fixture
def layers():
    torch.manual_seed(0)
    model = Layers()
    kinds = ["linear", "embedding", "conv"]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=kinds), model)
    transposed = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], fan_in_fan_out=True)
    inject_adapter_in_model(transposed, model.gpt2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def adapter_of(model):
    return {
        name.replace(".default", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def peft_deltas(model):
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def in_layout_of(name, delta):
    """[out, in] as the aggregator sees it: a Conv1D's weight is stored transposed."""
    return delta.T if name == "gpt2.0" else delta.flatten(1)


def test_factors_have_the_delta_weight_of_peft(layers):
    adapter = adapter_of(layers)
    layout = layout_of(adapter)
    assert set(layout.modules) == {"linear", "gpt2.0", "embedding", "conv"}
    assert layout.others == ()
    for name, delta in peft_deltas(layers).items():
        factors = factors_from(adapter, name, layout.modules[name], 1.5)
        found = factors.scale * factors.B @ factors.A
        assert torch.allclose(found, in_layout_of(name, delta), atol=1e-6), name


def test_distributed_adapter_gives_peft_the_mean_delta_weight(layers):
    adapter = adapter_of(layers)
    scales = dict.fromkeys(layout_of(adapter).modules, 1.5)
    aggregator = AdapterAggregator("product-delta", scales, max_rank=4)
    aggregator.init(adapter)
    sent = aggregator.distribute()
    names = set(aggregator.trainable())
    updates, deltas = [], []
    parameters = {name.replace(".default", ""): p for name, p in layers.named_parameters()}
    for index, weight in enumerate((1, 3)):
        with torch.no_grad():
            for name in names:  # clients that end where one of rank 2 can: they move B alone
                start_at_zero = name.endswith(("lora_B.weight", "lora_embedding_A"))
                parameters[name].copy_(sent[name] + (index + 1) * start_at_zero)
        updates.append(AdapterUpdate(index, sent, adapter_of(layers), weight))
        deltas.append(peft_deltas(layers))
    aggregator.aggregate(updates)
    with torch.no_grad():
        for name, value in aggregator.distribute().items():
            parameters[name].copy_(value)
    for name, delta in peft_deltas(layers).items():
        expected = 0.25 * deltas[0][name] + 0.75 * deltas[1][name]
        assert torch.allclose(delta, expected, atol=1e-5), name
