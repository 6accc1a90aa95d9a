"""Three clients with three different cuts on one trunk, through real gRPC: each is its unsplit model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flower_split.config import RunConfig
from flower_split.lora import adapter_state
from flower_split.parties.client_cuts import overlap_adapter
from flower_split.split import CutLayers
from flower_split.training.loss import Batch
from tests.acceptance.federation import (
    SGD,
    Whole,
    federation,
    make_batch,
    make_config,
    perturbed,
    write_checkpoint,
)

RUN = CutLayers(1, 5)
CUTS = {0: RUN, 1: CutLayers(2, 4), 2: CutLayers(3, 5)}
BATCHES = {
    0: make_batch(2, [9, 4], seed=1),
    1: make_batch(4, [12, 12, 2, 7], seed=2),
    2: make_batch(3, [20, 18, 20], seed=3),
}
TOKENS = {s: int((b["labels"][:, 1:] != -100).sum()) for s, b in BATCHES.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def wide_config(checkpoint: Path, **train: object) -> RunConfig:
    config = make_config(checkpoint, **train)
    return replace(config, model=replace(config.model, first_cut=RUN.first, second_cut=RUN.second))


def layer_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def passes(slot: int, name: str) -> bool:
    """Whether the slot's calls run the trunk's copy of the layer."""
    return CUTS[slot].first <= layer_of(name) < CUTS[slot].second


class OneRound:
    """One window of three clients from adapters that are not at their beginning."""

    def __init__(
        self,
        config: RunConfig,
        *,
        equal_copies: bool,
        batches: Mapping[int, Sequence[Batch]] | None = None,
        order: Sequence[int] | None = None,
        poison: int | None = None,
    ) -> None:
        with federation(config, CUTS) as run:
            first, _ = overlap_adapter(config, CUTS.values())
            own = adapter_state(run.client_model(0))
            self.trunk0 = perturbed(run.engine.adapter(), 8)
            self.client0 = perturbed({**own, **first}, 7)
            if equal_copies:
                self.client0 |= {name: self.trunk0[name] for name in first}
            run.load_trunk(self.trunk0)
            bad = {name: tensor * math.nan for name, tensor in self.client0.items()}
            self.returned, self.results, self.report = run.train(
                self.client0,
                batches or {slot: [batch] for slot, batch in BATCHES.items()},
                order=order,
                poisoned={} if poison is None else {poison: bad},
                quorum=1.0 if poison is None else 0.5,
            )
            self.trunk = run.engine.adapter()

    def start_of(self, slot: int) -> dict[str, Tensor]:
        """The adapter of the whole model that the slot computes with."""
        theirs = {name: t for name, t in self.trunk0.items() if passes(slot, name)}
        return {**self.trunk0, **self.client0, **theirs}


def gradients(whole: Whole, start: Mapping[str, Tensor], batch: Batch, tokens: int):
    """Loss and gradients of the unsplit model with this adapter."""
    whole.load(start)
    whole.model.zero_grad(set_to_none=True)
    logits = whole.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
    loss = total / tokens
    loss.backward()
    named = whole.model.named_parameters()
    found = {n.replace(".default.", "."): p.grad.clone() for n, p in named if p.grad is not None}
    return float(loss.detach()), found


@pytest.mark.parametrize("equal_copies", [True, False], ids=["equal", "gone-apart"])
def test_three_clients_of_three_cuts_each_step_bit_for_bit_as_their_unsplit_model(
    checkpoint: Path, equal_copies: bool
) -> None:
    config = wide_config(checkpoint)
    done = OneRound(config, equal_copies=equal_copies)
    whole = Whole(config)
    for slot, batch in BATCHES.items():
        loss, grads = gradients(whole, done.start_of(slot), batch, TOKENS[slot])
        assert done.results[slot].steps[0].loss == loss
        found = done.returned[slot]
        assert {layer_of(n) for n in found} == set(range(6)) - set(
            range(CUTS[slot].first, CUTS[slot].second)
        )
        for name, tensor in found.items():
            wanted = torch.add(done.client0[name], grads[name], alpha=-SGD.learning_rate)
            assert torch.equal(tensor, wanted), (slot, name)
            assert not torch.equal(tensor, done.client0[name])


@pytest.mark.parametrize("batches", ["off", "on"])
@pytest.mark.parametrize("equal_copies", [True, False], ids=["equal", "gone-apart"])
def test_trunk_steps_by_the_data_that_passed_through_each_layer(
    checkpoint: Path, equal_copies: bool, batches: str
) -> None:
    config = wide_config(checkpoint)
    config = replace(config, trunk=replace(config.trunk, window_batches=batches))
    done = OneRound(config, equal_copies=equal_copies)
    whole = Whole(config)
    found = {s: gradients(whole, done.start_of(s), b, TOKENS[s])[1] for s, b in BATCHES.items()}
    assert done.report.optimizer_steps == 1
    for name, tensor in done.trunk.items():
        who = [slot for slot in CUTS if passes(slot, name)]
        tokens = sum(TOKENS[slot] for slot in who)
        mean = sum(found[slot][name].double() * TOKENS[slot] / tokens for slot in who)
        wanted = done.trunk0[name] - SGD.learning_rate * mean
        assert float((tensor - wanted).norm() / wanted.norm()) < 1e-6, name
    # Layer 1: slot 0 alone, so its step is that of its own unsplit model, bit for bit.
    for name in (n for n in done.trunk if layer_of(n) == 1):
        alone = torch.add(done.trunk0[name], found[0][name], alpha=-SGD.learning_rate)
        torch.testing.assert_close(done.trunk[name], alone, rtol=1e-6, atol=1e-7)


def test_layer_that_all_pass_through_steps_as_in_one_model_on_all_data(checkpoint: Path) -> None:
    """Layer 3, which is the trunk's for everybody: all data count there, on equal models."""
    config = wide_config(checkpoint)
    done = OneRound(config, equal_copies=True)
    reference = Whole(config)
    reference.load({**done.trunk0, **done.client0})
    central = reference.sgd_step(list(BATCHES.values()), SGD.learning_rate)
    for name in (n for n in done.trunk if layer_of(n) == 3):
        torch.testing.assert_close(done.trunk[name], central[name], rtol=1e-5, atol=1e-7)
    # Layer 1 is not, since slots 1 and 2 trained their own.
    apart = [n for n in done.trunk if layer_of(n) == 1]
    assert any((done.trunk[n] - central[n]).abs().max() > 1e-4 for n in apart)


def test_any_starting_order_gives_the_same_bits(checkpoint: Path) -> None:
    config = wide_config(checkpoint)
    first, *others = (
        OneRound(config, equal_copies=False, order=order) for order in ((0, 1, 2), (2, 1, 0))
    )
    for other in others:
        assert first.report.digest == other.report.digest
        for slot in CUTS:
            mine, its = first.returned[slot], other.returned[slot]
            assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_micro_batches_of_a_client_with_own_cuts_equal_one_batch(checkpoint: Path) -> None:
    halves = {
        slot: [{k: t[:1] for k, t in batch.items()}, {k: t[1:] for k, t in batch.items()}]
        for slot, batch in BATCHES.items()
    }
    whole = OneRound(wide_config(checkpoint), equal_copies=False)
    config = wide_config(checkpoint, gradient_accumulation_steps=2)
    split = OneRound(config, equal_copies=False, batches=halves)
    assert [slot.contributions for slot in split.report.slots] == [2, 2, 2]
    for name, tensor in whole.trunk.items():
        torch.testing.assert_close(split.trunk[name], tensor, rtol=1e-5, atol=1e-6)


def test_client_that_is_lost_leaves_the_denominators_that_it_was_in(checkpoint: Path) -> None:
    config = wide_config(checkpoint)
    done = OneRound(config, equal_copies=True, poison=0)
    whole = Whole(config)
    found = {s: gradients(whole, done.start_of(s), BATCHES[s], TOKENS[s])[1] for s in (1, 2)}
    for name, tensor in done.trunk.items():
        who = [slot for slot in (1, 2) if passes(slot, name)]
        if not who:  # layer 1: only the lost client passed through it
            assert torch.equal(tensor, done.trunk0[name])
            continue
        tokens = sum(TOKENS[slot] for slot in who)
        mean = sum(found[slot][name].double() * TOKENS[slot] / tokens for slot in who)
        wanted = done.trunk0[name] - SGD.learning_rate * mean
        assert float((tensor - wanted).norm() / wanted.norm()) < 1e-6, name
