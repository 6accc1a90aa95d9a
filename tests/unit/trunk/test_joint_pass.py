"""Joint passes of several clients, against the trunk's own module called for each of them alone."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from flower_split.config import LoraPartConfig, OptimizerConfig
from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.lora import attach_lora
from flower_split.split import CutLayers, TrunkModel, split_model
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.joining import MAX_PADDED, Part, passes_of
from flower_split.trunk.compute.joint_pass import Given, JointCompute, JointPass
from flower_split.trunk.compute.window_sum import Counted, WindowSum
from tests.support.tiny_models import tiny_model

CUTS = CutLayers(1, 3)
SGD = OptimizerConfig(name="sgd", learning_rate=0.5, max_grad_norm=0.0)


def trunk_of(
    family: str, dtype: torch.dtype = torch.float64, *, dropout: float = 0.0
) -> TrunkModel:
    """Two layers in the middle, with LoRA whose B is not zero."""
    _, trunk = split_model(tiny_model(family), CUTS)
    attach_lora(trunk, CUTS, {"trunk": LoraPartConfig(r=2, dropout=dropout)}, seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(trunk.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return trunk.to(dtype)


@dataclass
class Sent:
    """What one client sends for one micro-batch."""

    slot: int
    hidden: Tensor
    grad: Tensor
    mask: Tensor | None
    tokens: float
    denominator: float

    def part(self) -> Part:
        masked = {} if self.mask is None else {"attention_mask": self.mask}
        return Part(slot=self.slot, tensors={"hidden_states": self.hidden, **masked})


def sent(slot: int, rows: int, length: int, width: int, *, padded: int = 0, seed: int = 0) -> Sent:
    """Random numbers; the first ``padded`` positions of the first row are padding."""
    generator = torch.Generator().manual_seed(1000 * seed + slot)
    hidden = torch.randn(rows, length, width, generator=generator, dtype=torch.float64)
    grad = torch.randn(rows, length, width, generator=generator, dtype=torch.float64)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :padded] = 0
    grad = grad * mask[..., None]
    tokens = float(rows * length - padded)
    return Sent(slot, hidden, grad, mask if padded else None, tokens, tokens * (1 + slot))


def alone(trunk: nn.Module, one: Sent) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, smashed gradient and parameter gradients of one client, by autograd."""
    parameters = [p for _, p in sorted(trunk.named_parameters()) if p.requires_grad]
    leaf = one.hidden.clone().requires_grad_()
    output = trunk(leaf, attention_mask=one.mask)
    smashed_grad, *gradients = torch.autograd.grad(output, [leaf, *parameters], one.grad)
    return output.detach(), smashed_grad, gradients


def weighted_sum(trunk: nn.Module, clients: list[Sent]) -> list[Tensor]:
    """``Σ d g`` by parameter."""
    each = [[g * one.denominator for g in alone(trunk, one)[2]] for one in clients]
    return [torch.stack(same).sum(0) for same in zip(*each, strict=True)]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert error <= tolerance, error


def kept(one: JointPass) -> None:
    """Every graph has room."""


def joint_of(trunk: nn.Module) -> JointCompute:
    return JointCompute(TrunkCompute(trunk, SGD, seed=0), takes_mask=True, max_positions=10_000)


# Families whose norms or softmax go through fp32 have its rounding, whatever the dtype.
@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        ("gpt2", torch.float64, 1e-10),
        ("opt", torch.float64, 1e-10),
        ("llama", torch.float64, 1e-6),
        ("bloom", torch.float32, 1e-5),
        ("mixtral", torch.float32, 1e-5),
    ],
)
def test_joint_pass_of_unequal_clients_gives_each_its_own_numbers_and_all_the_sum(
    family: str, dtype: torch.dtype, tolerance: float
):
    trunk = trunk_of(family, dtype)
    width = trunk.hidden_size
    clients = [
        sent(0, 2, 6, width, padded=2),
        sent(1, 1, 5, width),
        sent(2, 3, 4, width, padded=1),
        sent(3, 1, 40, width),  # too long to pad the others to: a pass of its own
    ]
    for one in clients:
        one.hidden, one.grad = one.hidden.to(dtype), one.grad.to(dtype)
    joint = joint_of(trunk)
    made = joint.forward([one.part() for one in reversed(clients)], "name", kept)
    assert [[rows.slot for rows in one.rows] for one in made.passes] == [[0, 1, 2], [3]]
    given = {one.slot: Given(one.grad, one.denominator) for one in clients}
    back = joint.backward(made.passes, given)
    total = WindowSum(joint, lambda cuts: None)
    counted = [Counted(one.slot, one.tokens, one.denominator) for one in clients]
    total.add(0, made.passes, back.gradients, counted)
    for one in clients:
        output, smashed_grad, _ = alone(trunk, one)
        real = torch.ones(output.shape[:2]) if one.mask is None else one.mask
        close(made.outputs[one.slot][real.bool()], output[real.bool()], tolerance)
        close(back.smashed_grads[one.slot], smashed_grad, tolerance)
        norm = float(smashed_grad.norm() * one.denominator) ** 2
        assert back.norms_squared[one.slot] == pytest.approx(norm, rel=10 * tolerance)
    (found,) = total.gradients([0, 1, 2, 3]).values()
    tokens = sum(one.tokens for one in clients)
    assert found.num_tokens == tokens
    for mine, other in zip(found.total, weighted_sum(trunk, clients), strict=True):
        close(mine * found.denominator / tokens, other / tokens, tolerance)


def test_sum_without_a_client_that_left_is_that_of_the_others():
    trunk = trunk_of("gpt2")
    width = trunk.hidden_size
    first = [sent(slot, 2, 5 - slot, width) for slot in range(3)]
    second = [sent(slot, 1, 5, width, seed=1) for slot in (0, 2)]  # slot 1 had one micro-batch
    joint = joint_of(trunk)
    total = WindowSum(joint, lambda cuts: None)
    for index, clients in ((1, second), (0, first)):  # the second is done first
        made = joint.forward([one.part() for one in clients], str(index), kept)
        given = {one.slot: Given(one.grad, one.denominator) for one in clients}
        back = joint.backward(made.passes, given)
        counted = [Counted(one.slot, one.tokens, one.denominator) for one in clients]
        total.add(index, made.passes, back.gradients, counted)
    (found,) = total.gradients([0, 1]).values()
    stay = [one for one in first + second if one.slot != 2]
    tokens = sum(one.tokens for one in stay)
    expected = [gradient / tokens for gradient in weighted_sum(trunk, stay)]
    assert total.times_again == 1 and found.num_tokens == tokens
    for mine, other in zip(found.total, expected, strict=True):
        close(mine * found.denominator / tokens, other)


def test_joint_pass_repeats_its_dropout_masks_when_the_sum_is_taken_again():
    trunk = trunk_of("llama", dropout=0.5)
    joint = joint_of(trunk)
    clients = [sent(slot, 2, 4, trunk.hidden_size) for slot in range(2)]
    parts = [one.part() for one in clients]
    made = joint.forward(parts, "name", kept)
    assert torch.equal(made.outputs[1], joint.forward(parts, "name", kept).outputs[1])
    assert not torch.equal(made.outputs[1], joint.forward(parts, "other", kept).outputs[1])
    back = joint.backward(
        made.passes, {one.slot: Given(one.grad, one.denominator) for one in clients}
    )
    again = joint.again(made.passes[0], {0, 1})
    for mine, other in zip(back.gradients[0].gradients, again[0].gradients, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("fault", ["overflow", "denominator"])
def test_client_at_fault_is_named_and_the_others_keep_their_numbers(fault: str):
    trunk = trunk_of("llama", torch.float32)
    width = trunk.hidden_size
    clients = [sent(slot, 2, 4, width) for slot in range(3)]
    for one in clients:
        one.hidden, one.grad = one.hidden.float(), one.grad.float()
    if fault == "overflow":
        clients[1].grad = torch.full_like(clients[1].grad, 3e38)  # finite, and its backward is not
    else:
        clients[1].denominator = 1e30
    joint = joint_of(trunk)
    made = joint.forward([one.part() for one in clients], "name", kept)
    given = {one.slot: Given(one.grad, one.denominator) for one in clients}
    back = joint.backward(made.passes, given)
    for one in (clients[0], clients[2]):
        close(back.smashed_grads[one.slot], alone(trunk, one)[1], 1e-5)
    if fault == "overflow":
        assert back.failures.keys() == {1}
        assert isinstance(back.failures[1], TrunkRefused)
        assert back.failures[1].reason is RefusalReason.NON_FINITE
    total = WindowSum(joint, lambda cuts: None)
    good = [one for one in clients if one.slot in back.smashed_grads]
    counted = [Counted(one.slot, one.tokens, one.denominator) for one in good]
    total.add(0, made.passes, back.gradients, counted)
    honest = [clients[0], clients[2]]
    (found,) = total.gradients([0, 2]).values()
    expected = weighted_sum(trunk, honest)
    for mine, other in zip(found.total, expected, strict=True):
        close(mine * found.denominator, other, 1e-4)


def test_forward_that_fails_for_one_client_is_computed_for_the_others():
    class Fussy(nn.Module):
        """Refuses what is above 9, as a kernel might."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3, dtype=torch.float64))

        def forward(self, hidden_states, attention_mask=None, position_ids=None):
            if bool((hidden_states > 9).any()):
                raise RuntimeError("above 9")
            return hidden_states @ self.weight

    joint = joint_of(Fussy())
    clients = [sent(slot, 1, 2, 3) for slot in range(3)]
    clients[1].hidden[0, 0, 0] = 10.0
    made = joint.forward([one.part() for one in clients], "name", kept)
    assert sorted(made.outputs) == [0, 2]
    assert made.failures.keys() == {1} and "above 9" in str(made.failures[1])


def test_passes_hold_what_goes_together_and_little_padding():
    def part(slot: int, rows: int, length: int, **tensors: Tensor) -> Part:
        return Part(slot=slot, tensors={"hidden_states": torch.zeros(rows, length, 2), **tensors})

    def slots(parts: list[Part], takes_mask: bool = True, most: int = 1000) -> list[list[int]]:
        groups = passes_of(parts, takes_mask=takes_mask, max_positions=most)
        return [[one.slot for one in group] for group in groups]

    assert slots([part(2, 1, 4), part(0, 2, 5), part(1, 1, 4)]) == [[0, 1, 2]]
    assert slots([part(2, 1, 4), part(0, 2, 5), part(1, 1, 4)], takes_mask=False) == [[0], [1, 2]]
    whole_mask = {"attention_mask": torch.zeros(1, 1, 4, 4)}
    assert slots([part(0, 1, 4), part(1, 1, 4, **whole_mask), part(2, 1, 4)]) == [[0, 2], [1]]
    positions = {"position_ids": torch.arange(4)[None]}
    assert slots([part(0, 1, 4), part(1, 1, 4, **positions), part(2, 1, 4)]) == [[0, 2], [1]]
    lengths = [3, 100, 90, 4, 60, 5, 300]
    parts = [part(i, 1, n) for i, n in enumerate(lengths)]
    groups = passes_of(parts, takes_mask=True, max_positions=1000)
    assert sorted(one.slot for group in groups for one in group) == list(range(7))
    for group in groups:
        padded = len(group) * max(lengths[one.slot] for one in group)
        assert padded <= MAX_PADDED * sum(lengths[one.slot] for one in group)
    assert len(groups) == 3
    assert slots([part(i, 2, 4) for i in range(5)], most=16) == [[0, 1], [2, 3], [4]]
    assert slots([part(0, 9, 4), part(1, 1, 4)], most=16) == [[0], [1]]  # one alone may have more


def test_graphs_of_two_passes_are_never_there_at_once_where_the_first_is_taken_away():
    trunk = trunk_of("llama")
    compute = TrunkCompute(trunk, SGD, seed=0)
    joint = JointCompute(compute, takes_mask=True, max_positions=8)
    clients = [sent(slot, 2, 4, trunk.hidden_size) for slot in range(2)]
    graphs: list[bool] = []

    def take(one: JointPass) -> None:
        graphs.append(one.activation.output is not None)
        one.activation.output = None

    made = joint.forward([one.part() for one in clients], "name", take)
    assert graphs == [True, True] and len(made.passes) == 2
    given = {one.slot: Given(one.grad, one.denominator) for one in clients}
    back = joint.backward(made.passes, given)
    for one in clients:
        close(back.smashed_grads[one.slot], alone(trunk, one)[1], 1e-6)


def test_position_ids_of_one_row_or_several_are_joined_with_their_rows():
    trunk = trunk_of("llama")
    width = trunk.hidden_size
    clients = [sent(0, 2, 4, width), sent(1, 1, 5, width)]
    ids = {0: torch.tensor([[0, 1, 2, 9]]), 1: torch.tensor([[0, 5, 6, 7, 20]])}
    parts = [
        Part(slot=c.slot, tensors={"hidden_states": c.hidden, "position_ids": ids[c.slot]})
        for c in clients
    ]
    made = joint_of(trunk).forward(parts, "name", kept)
    assert len(made.passes) == 1
    for one in clients:
        expected = trunk(one.hidden, position_ids=ids[one.slot]).detach()
        close(made.outputs[one.slot], expected, 1e-6)
        assert not torch.allclose(expected, trunk(one.hidden).detach())
