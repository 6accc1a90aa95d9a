"""Clients with cut layers of their own on one engine: whose gradient counts where."""

import time

import pytest
import torch
from torch import Tensor, nn

from flower_split.aggregation.rules.parse import parse_rules
from flower_split.config import LoraPartConfig, OptimizerConfig
from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.lora import attach_lora
from flower_split.protocol.values import (
    BackwardCall,
    ContributionKey,
    ForwardCall,
    ForwardMode,
    RoundBase,
)
from flower_split.split import CutLayers, TrunkModel, split_model
from flower_split.split.structure.host_call import hidden_states_of
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import Reduction, SlotGradient
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.tiny_models import tiny_model
from tests.support.toy_trunk import make_engine, make_plan

WIDE = CutLayers(1, 5)
CUTS = {0: WIDE, 1: CutLayers(2, 4), 2: CutLayers(1, 3), 3: None}
TOKENS = {0: 3.0, 1: 5.0, 2: 2.0, 3: 4.0}
RATE = 0.5
SGD = OptimizerConfig(name="sgd", learning_rate=RATE, max_grad_norm=0.0)
ADAMW = OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.1, max_grad_norm=0.0)


def far() -> float:
    return time.monotonic() + 30


def wide_trunk(*, dropout: float = 0.0) -> TrunkModel:
    """Layers 1 to 4 of 6, with LoRA whose B is not zero."""
    _, trunk = split_model(tiny_model("llama", num_hidden_layers=6), WIDE)
    attach_lora(trunk, WIDE, {"trunk": LoraPartConfig(r=2, dropout=dropout)}, seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(trunk.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return trunk


def engine_of(
    trunk: nn.Module,
    optimizer: OptimizerConfig = SGD,
    activation_bytes: int = 1 << 26,
    checkpoints: CheckpointStore | None = None,
) -> TrunkEngine:
    return TrunkEngine(
        TrunkCompute(trunk, optimizer, seed=0),
        mode="joint",
        hidden_size=trunk.hidden_size,
        fingerprint={"model": "tiny", "cut-layers": "1:5"},
        activation_bytes=activation_bytes,
        checkpoints=checkpoints,
    )


class Caller:
    """One client's calls; its tensors depend on its slot alone."""

    def __init__(self, engine: TrunkEngine, slot: int, steps: int = 1, **changes: object) -> None:
        self.engine, self.slot = engine, slot
        cuts = changes.get("cuts", CUTS[slot])
        fingerprint = {"model": "tiny", "cut-layers": "1:5"}
        self.grant = engine.open_session(f"token-{slot}", fingerprint, steps, False, cuts)
        generator = torch.Generator().manual_seed(100 + slot)
        shape = (slot + 1, 4, engine.hidden_size)
        self.hidden = torch.randn(shape, generator=generator)
        self.grad = torch.randn(shape, generator=generator)

    def key(self, window: int = 0) -> ContributionKey:
        return ContributionKey("test", self.grant.server_round, self.grant.attempt, window, 0)

    def forward(self, window: int = 0) -> Tensor:
        return self.engine.forward(
            ForwardCall(
                session=self.grant.session,
                epoch=self.grant.epoch,
                key=self.key(window),
                version=self.grant.version + window,
                mode=ForwardMode.TRAIN,
                tensors={"hidden_states": self.hidden},
                digest=b"forward",
                deadline=far(),
            )
        ).tensor

    def backward(self, window: int = 0) -> Tensor:
        return self.engine.backward(
            BackwardCall(
                session=self.grant.session,
                epoch=self.grant.epoch,
                key=self.key(window),
                version=self.grant.version + window,
                grad=self.grad,
                num_tokens=TOKENS[self.slot],
                loss_denominator=TOKENS[self.slot],
                last=True,
                digest=b"backward",
                deadline=far(),
            )
        ).tensor


def run_window(
    trunk: TrunkModel,
    slots=(0, 1, 2, 3),
    *,
    order=None,
    twice: bool = False,
    optimizer: OptimizerConfig = SGD,
    activation_bytes: int = 1 << 26,
):
    """One window of ``slots``: what each got, and the trunk's adapter after the step."""
    engine = engine_of(trunk, optimizer, activation_bytes)
    try:
        engine.begin_round(make_plan(slots, steps_per_round=1))
        callers = {slot: Caller(engine, slot) for slot in order or slots}
        outputs = {slot: caller.forward() for slot, caller in callers.items()}
        grads = {}
        for slot, caller in callers.items():
            if twice:
                assert torch.equal(caller.forward(), outputs[slot])
            grads[slot] = caller.backward()
            if twice and slot != slots[-1]:
                assert torch.equal(caller.backward(), grads[slot])
        report = engine.prepare_round("test", 1, 0, far())
        assert report.optimizer_steps == 1
        recomputes = report.activations.recomputes
        return outputs, grads, engine.adapter(), recomputes, report.digest
    finally:
        engine.close()


def reference(slots=(0, 1, 2, 3)):
    """The same by hand: plain layers of a plain model, and ``Σ gᵢ·nᵢ / Σ nᵢ`` layer by layer.

    The trunk's input is taken as the embeddings of an unsplit model from whose stack all layers but
    the client's span have been taken away.
    """
    trunk = wide_trunk()
    own = {n.replace(".default.", "."): p for n, p in trunk.named_parameters() if "lora_" in n}
    outputs, grads, sums, counts = {}, {}, {}, {}
    for slot in slots:
        cuts = CUTS[slot] or WIDE
        model = tiny_model("llama", num_hidden_layers=6)
        attach_lora(model, WIDE, {"trunk": LoraPartConfig(r=2)}, seed=0)
        mine = {n.replace(".default.", "."): p for n, p in model.named_parameters() if "lora_" in n}
        for name, parameter in mine.items():
            parameter.data.copy_(own[name].data)
        stack = model.model.layers
        names = {id(p): n for n, p in mine.items()}
        model.model.layers = nn.ModuleList(list(stack)[cuts.first : cuts.second])
        model.model.norm = nn.Identity()
        generator = torch.Generator().manual_seed(100 + slot)
        shape = (slot + 1, 4, trunk.hidden_size)
        hidden = torch.randn(shape, generator=generator).requires_grad_()
        grad = torch.randn(shape, generator=generator)
        model.train()
        output = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        parameters = [p for p in model.model.parameters() if p.requires_grad]
        smashed, *rest = torch.autograd.grad(output, [hidden, *parameters], grad)
        outputs[slot], grads[slot] = output.detach(), smashed
        for parameter, gradient in zip(parameters, rest, strict=True):
            name = names[id(parameter)]
            sums[name] = sums.get(name, 0) + TOKENS[slot] * gradient.double()
            counts[name] = counts.get(name, 0.0) + TOKENS[slot]
    stepped = {
        name: value.detach().double() - RATE * sums[name] / counts[name]
        if name in sums
        else value.detach().double()
        for name, value in own.items()
    }
    return outputs, grads, stepped


def test_window_of_four_spans_equals_sgd_on_what_passed_through_each_layer() -> None:
    outputs, grads, adapter, _, _ = run_window(wide_trunk())
    expected_outputs, expected_grads, stepped = reference()
    for slot in CUTS:
        assert torch.equal(outputs[slot], expected_outputs[slot]), slot
        assert torch.equal(grads[slot], expected_grads[slot]), slot
    assert adapter.keys() == stepped.keys()
    for name, value in stepped.items():
        assert float((adapter[name] - value).norm() / value.norm()) < 1e-6, name
    # Layer 4 is passed by slots 0 and 3 only: had all tokens counted, its step were half as long.
    name, start = next((n, v) for n, v in start_of().items() if ".layers.4." in n and "lora_B" in n)
    moved, wanted = adapter[name] - start, stepped[name] - start
    assert float(moved.norm() / wanted.norm()) == pytest.approx(1.0, rel=1e-4)


def start_of() -> dict[str, Tensor]:
    return {
        n.replace(".default.", "."): p.detach()
        for n, p in wide_trunk().named_parameters()
        if "lora_" in n
    }


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_layer_that_nobody_passed_through_stays_bit_for_bit(optimizer: OptimizerConfig) -> None:
    _, _, adapter, _, _ = run_window(wide_trunk(), (1, 2), optimizer=optimizer)
    start = start_of()
    for name, value in adapter.items():
        passed = any(f".layers.{index}." in name for index in (1, 2, 3))
        assert torch.equal(value, start[name]) != passed, name


def test_retries_and_any_order_of_arrival_give_the_same_bits() -> None:
    first = run_window(wide_trunk(dropout=0.3))
    for order in ((3, 2, 1, 0), (1, 3, 0, 2)):
        other = run_window(wide_trunk(dropout=0.3), order=order, twice=True)
        assert all(torch.equal(first[0][slot], other[0][slot]) for slot in CUTS)
        assert all(torch.equal(first[1][slot], other[1][slot]) for slot in CUTS)
        assert first[4] == other[4]


def test_recomputed_span_gives_the_same_bits_with_dropout() -> None:
    kept = run_window(wide_trunk(dropout=0.3))
    # Room for the four inputs, and for no graph.
    again = run_window(wide_trunk(dropout=0.3), activation_bytes=40_000)
    assert kept[3] == 0 and again[3] == len(CUTS)
    assert all(torch.equal(kept[1][slot], again[1][slot]) for slot in CUTS)
    assert kept[4] == again[4]


def test_checkpoint_of_a_round_with_spans_is_restored_to_the_same_bits(tmp_path) -> None:
    def one(engine: TrunkEngine, server_round: int, base: RoundBase) -> str:
        changes = {"server_round": server_round, "num_server_rounds": 2, "base": base}
        engine.begin_round(make_plan((0, 1, 2), steps_per_round=1, **changes))
        callers = [Caller(engine, slot) for slot in (0, 1, 2)]
        for caller in callers:
            caller.forward()
        for caller in callers:
            caller.backward()
        digest = engine.prepare_round("test", server_round, 0, far()).digest
        engine.commit_round("test", server_round, 0)
        return digest

    store = CheckpointStore(tmp_path)
    whole = engine_of(wide_trunk(), ADAMW, checkpoints=store)
    first = one(whole, 1, RoundBase(0))
    second = one(whole, 2, RoundBase(1, first))
    whole.close()
    (tmp_path / "trunk-test" / "trunk-2.json").unlink()
    restarted = engine_of(wide_trunk(), ADAMW, checkpoints=store)
    assert one(restarted, 2, RoundBase(1, first)) == second
    restarted.close()


# ---- who may join


def refusal(engine: TrunkEngine, cuts: CutLayers | None, cut_layers: str = "1:5") -> TrunkRefused:
    engine.begin_round(make_plan((0,), steps_per_round=1))
    fingerprint = {"model": "tiny", "cut-layers": cut_layers}
    with pytest.raises(TrunkRefused) as caught:
        engine.open_session("token-0", fingerprint, 1, False, cuts)
    engine.close()
    return caught.value


@pytest.mark.parametrize("cuts", [CutLayers(0, 4), CutLayers(2, 6), CutLayers(5, 6)], ids=str)
def test_cuts_outside_the_trunks_span_are_refused_with_both(cuts: CutLayers) -> None:
    error = refusal(engine_of(wide_trunk()), cuts)
    assert error.reason is RefusalReason.FINGERPRINT_MISMATCH
    assert "layers 1 to 4" in str(error)
    assert f"first cut {cuts.first} and second cut {cuts.second}" in str(error)
    assert "Give the client more layers, or the trunk" in str(error)


def test_other_cuts_in_the_fingerprint_are_refused_only_where_the_client_names_none() -> None:
    error = refusal(engine_of(wide_trunk()), None, "2:4")
    assert error.reason is RefusalReason.FINGERPRINT_MISMATCH and "cut-layers" in str(error)
    engine = engine_of(wide_trunk())
    engine.begin_round(make_plan((0,), steps_per_round=1))
    fingerprint = {"model": "tiny", "cut-layers": "2:4"}
    engine.open_session("token-0", fingerprint, 1, False, CutLayers(2, 4))
    with pytest.raises(TrunkRefused, match="model"):
        engine.open_session("token-0", {"model": "other"}, 1, False, CutLayers(2, 4))
    engine.close()


def test_other_cuts_for_the_same_session_are_refused() -> None:
    engine = engine_of(wide_trunk())
    engine.begin_round(make_plan((0,), steps_per_round=1))
    Caller(engine, 0, cuts=CutLayers(2, 4))
    Caller(engine, 0, cuts=CutLayers(2, 4))  # a retry
    with pytest.raises(TrunkRefused, match="cannot change within a round"):
        Caller(engine, 0, cuts=CutLayers(2, 5))
    engine.close()


def test_stranger_makes_no_span() -> None:
    trunk = wide_trunk()
    engine = engine_of(trunk)
    engine.begin_round(make_plan((0,), steps_per_round=1))
    with pytest.raises(TrunkRefused, match="token"):
        engine.open_session("guess", {"model": "tiny"}, 1, False, CutLayers(2, 4))
    assert not trunk._spans
    engine.close()


def test_trunk_that_is_no_part_of_a_model_runs_as_a_whole_only() -> None:
    engine = make_engine()
    engine.begin_round(make_plan((0,), steps_per_round=1))
    with pytest.raises(TrunkRefused, match="ToyTrunk.*as a whole only"):
        engine.open_session("token-0", {"model": "toy"}, 1, False, CutLayers(0, 1))
    engine.close()


def test_layers_that_share_a_weight_across_a_cut_are_refused() -> None:
    trunk = wide_trunk()
    layers = trunk.stack.layers(trunk)
    layers[3].mlp.up_proj.base_layer.weight = layers[1].mlp.up_proj.base_layer.weight
    error = refusal(engine_of(trunk), CutLayers(2, 4))
    assert "share a weight" in str(error) and "layers 2 to 3" in str(error)


def test_layers_that_hand_each_other_more_than_hidden_states_are_refused() -> None:
    trunk = wide_trunk()
    layers, seen = trunk.stack.layers(trunk), {}

    def keep(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        seen["left"] = hidden_states_of(output)

    def take(module: nn.Module, args: tuple[object, ...], output: object) -> object:
        left = seen.pop("left", torch.zeros(()))
        return output[0] + left if isinstance(output, tuple) else output + left

    layers[1].register_forward_hook(keep)
    layers[3].register_forward_hook(take)
    error = refusal(engine_of(trunk), CutLayers(3, 5))
    assert "more than hidden states" in str(error)


# ---- the sum by hand


def slot(values: list[float | None], tokens: float, covers: tuple[bool, ...] | None = None):
    gradient = SlotGradient(covers)
    tensors = [None if value is None else torch.tensor([value]) for value in values]
    gradient.add(0, tensors, num_tokens=tokens, loss_denominator=tokens)
    return gradient


def test_tokens_count_where_they_pass_through_and_an_unused_expert_counts_as_zero() -> None:
    slots = {
        0: slot([4.0, None], 1.0, (True, False)),
        1: slot([8.0, 2.0], 3.0),
        2: slot([None, None], 4.0, (False, True)),  # passes through, but no token used it
    }
    first, second = Reduction()(slots)
    assert first.item() == (4.0 * 1 + 8.0 * 3) / 4
    assert second.item() == pytest.approx(2.0 * 3 / 7)


def test_rules_look_at_each_group_of_clients_by_itself() -> None:
    slots = {
        0: slot([1.0, None], 1.0, (True, False)),
        1: slot([2.0, 10.0], 1.0),
        2: slot([9.0, 20.0], 1.0),
        3: slot([None, 90.0], 1.0, (False, True)),
    }
    first, second = Reduction(rules=parse_rules("median"))(slots)
    assert (first.item(), second.item()) == (2.0, 20.0)


def test_clipping_keeps_what_a_client_passes_through() -> None:
    slots = {0: slot([3.0, None], 1.0, (True, False)), 1: slot([1.0, 1.0], 1.0)}
    first, second = Reduction(max_client_norm=1.5)(slots)
    assert (first.item(), second.item()) == pytest.approx(((1.5 + 1.0) / 2, 1.0))
