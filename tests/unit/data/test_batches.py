"""Batches: padding by hand, every example once per epoch, order from the seed alone."""

import itertools

import pytest
import torch

from flower_split.data import Example, batches, eval_batches
from flower_split.errors import DataError


def _examples(count: int) -> list[Example]:
    return [Example([10 + i, 20 + i], [-100, 20 + i]) for i in range(count)]


def _first_ids(examples: list[Example], size: int, seed: int, count: int) -> list[list[int]]:
    made = batches(examples, size, seed=seed, pad_token_id=0)
    return [batch["input_ids"][:, 0].tolist() for batch in itertools.islice(made, count)]


def test_batch_of_unequal_lengths_is_padded_on_the_right() -> None:
    examples = [Example([5, 6, 7], [-100, 6, 7]), Example([8, 9], [8, 9])]
    [batch] = eval_batches(examples, 4, 1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, 9, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_eval_batches_keep_the_order_and_the_rest() -> None:
    sizes = [batch["input_ids"][:, 0].tolist() for batch in eval_batches(_examples(5), 2, 0)]
    assert sizes == [[10, 11], [12, 13], [14]]


def test_batches_of_an_epoch_hold_every_example_once() -> None:
    per_batch = _first_ids(_examples(5), 2, 3, 6)
    assert [len(batch) for batch in per_batch] == [2, 2, 1, 2, 2, 1]
    first, second = sum(per_batch[:3], []), sum(per_batch[3:], [])
    assert sorted(first) == sorted(second) == [10, 11, 12, 13, 14]
    assert first != second


def test_batches_depend_on_the_seed_alone() -> None:
    examples = _examples(50)
    random_state = torch.random.get_rng_state()
    assert _first_ids(examples, 4, 1, 30) == _first_ids(examples, 4, 1, 30)
    assert _first_ids(examples, 4, 1, 2) != _first_ids(examples, 4, 2, 2)
    assert torch.equal(random_state, torch.random.get_rng_state())


def test_batches_of_nothing_are_refused_at_once() -> None:
    with pytest.raises(DataError, match="at least one example"):
        batches([], 2, seed=0, pad_token_id=0)
