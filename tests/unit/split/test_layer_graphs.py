"""Layers as CUDA graphs: which calls replay one, and that a GPU's bits stay those of the layer itself."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flower_split.config import LoraPartConfig
from flower_split.lora import attach_lora
from flower_split.split import CutLayers
from flower_split.split.structure.compute_mode import compute_fast
from flower_split.split.structure.layer_graphs import MAX_GRAPHS, MAX_POSITIONS, GraphedForward


class Layer(nn.Module):
    """Takes what a decoder layer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        use_cache: bool | None = None,
        past_key_values: object = None,
    ) -> Tensor:
        cos, sin = position_embeddings
        return self.linear(hidden_states) * cos + sin


class Captures:
    """Stands for torch's capture, and counts replays."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, call: nn.Module, tensors: tuple[Tensor, ...]) -> Callable[..., object]:
        assert all(not tensor.grad_fn for tensor in tensors)
        call(*tensors)  # torch runs it, too

        def replay(*given: Tensor) -> object:
            assert [t.shape for t in given] == [t.shape for t in tensors]
            self.replays += 1
            return call(*given)

        return replay


def call(forward: GraphedForward, positions: int = 3, **named: object) -> Tensor:
    hidden = torch.arange(positions * 4.0).view(1, positions, 4)
    cos, sin = torch.full((1, positions, 4), 2.0), torch.ones(1, positions, 4)
    output = forward(hidden, position_embeddings=(cos, sin), **named)
    assert isinstance(output, Tensor)
    return output


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer()


@pytest.fixture
def captures() -> Captures:
    return Captures()


def test_second_call_of_a_kind_is_captured_and_replayed(layer: Layer, captures: Captures) -> None:
    forward = GraphedForward(layer, layer.forward, captures)
    outputs = [call(forward, use_cache=False) for _ in range(3)]
    assert (forward.num_graphs, captures.replays) == (1, 2)
    assert all(torch.equal(output, outputs[0]) and output.requires_grad for output in outputs)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("evaluation", {}),
        ("no autograd", {}),
        ("long", {}),
        ("object", {"past_key_values": object()}),
    ],
)
def test_other_calls_run_the_layer_itself(
    what: str, named: dict[str, object], layer: Layer, captures: Captures
) -> None:
    forward = GraphedForward(layer, layer.forward, captures)
    layer.train(what != "evaluation")
    for _ in range(3):
        with torch.set_grad_enabled(what != "no autograd"):
            call(forward, MAX_POSITIONS + 1 if what == "long" else 3, **named)
    assert (forward.num_graphs, captures.replays) == (0, 0)


def test_other_arguments_are_another_kind_and_kinds_have_a_limit(
    layer: Layer, captures: Captures
) -> None:
    forward = GraphedForward(layer, layer.forward, captures)
    for use_cache in (True, False, None):
        for _ in range(2):
            call(forward, use_cache=use_cache)
    assert forward.num_graphs == 3
    for positions in range(4, 12):
        for _ in range(2):
            call(forward, positions)
    assert forward.num_graphs == MAX_GRAPHS


def test_kinds_that_come_once_are_not_remembered_for_ever(layer: Layer, captures: Captures) -> None:
    forward = GraphedForward(layer, layer.forward, captures)
    call(forward, 1)
    for positions in range(2, 2 + 300):
        call(forward, positions)
    call(forward, 1)
    assert forward.num_graphs == 0
    call(forward, 1)
    assert forward.num_graphs == 1


def test_weights_that_moved_and_hooks_are_not_replayed(layer: Layer, captures: Captures) -> None:
    forward = GraphedForward(layer, layer.forward, captures)
    for _ in range(2):
        call(forward)
    assert captures.replays == 1
    layer.linear.weight = nn.Parameter(torch.zeros(4, 4))
    with torch.no_grad():
        layer.linear.bias.zero_()
    assert torch.equal(call(forward), torch.ones(1, 3, 4))
    handle = layer.linear.register_forward_hook(lambda *_: torch.full((1, 3, 4), 5.0))
    for _ in range(3):
        assert torch.equal(call(forward), torch.full((1, 3, 4), 11.0))
    handle.remove()
    assert captures.replays == 1


def test_weights_changed_in_place_are_seen(layer: Layer, captures: Captures) -> None:
    forward = GraphedForward(layer, layer.forward, captures)
    for _ in range(2):
        call(forward)
    with torch.no_grad():
        layer.linear.weight.zero_()
        layer.linear.bias.zero_()
    assert torch.equal(call(forward), torch.ones(1, 3, 4))
    assert captures.replays == 2


def test_random_state_is_as_without_a_capture(layer: Layer) -> None:
    def capture(call: nn.Module, tensors: tuple[Tensor, ...]) -> Callable[..., object]:
        torch.rand(3)  # as a capture's trial runs draw
        return call

    forward = GraphedForward(layer, layer.forward, capture)
    call(forward)
    torch.manual_seed(5)
    call(forward)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert forward.num_graphs == 1
    assert torch.equal(drawn, torch.rand(3))


def test_failed_capture_is_told_and_the_layer_runs(
    layer: Layer, caplog: pytest.LogCaptureFixture
) -> None:
    def capture(call: nn.Module, tensors: tuple[Tensor, ...]) -> Callable[..., object]:
        raise RuntimeError("operation not permitted when stream is capturing")

    forward = GraphedForward(layer, layer.forward, capture)
    first = call(forward)
    assert all(torch.equal(call(forward), first) for _ in range(3))
    assert caplog.text.count("runs without a CUDA graph") == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("padded", [False, True])
def test_gpu_replays_have_the_bits_of_the_compiled_layers(padded: bool) -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    own = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    lora = LoraPartConfig(r=8, dropout=0.1)
    attach_lora(own, CutLayers(1, 2), dict.fromkeys(("bottom", "trunk", "top"), lora), seed=0)
    for name, parameter in own.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    graphed = copy.deepcopy(own)
    compute_fast(own, own.model.layers)
    compute_fast(graphed, graphed.model.layers, one_at_a_time=True)
    for step in range(5):
        torch.manual_seed(step)
        ids = torch.randint(0, 128, (2, 64), device="cuda")
        mask = torch.ones_like(ids)
        if padded:
            mask[0, 50:] = 0
        results = []
        for model in (own, graphed):
            model.train()
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            torch.manual_seed(100 + step)  # of the dropout
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            gradients = torch.autograd.grad(loss, list(trained.values()))
            results.append([loss.detach(), *[gradient.clone() for gradient in gradients]])
            with torch.no_grad():
                for parameter, gradient in zip(trained.values(), gradients, strict=True):
                    parameter -= 0.1 * gradient
        assert all(map(torch.equal, *results)), step
    forwards = [vars(layer)["forward"] for layer in graphed.model.layers]
    assert [forward.num_graphs for forward in forwards] == [1, 1, 1]
