"""Batches of examples as a model takes them: right-padded, int64; pictures as their processor makes them.

Shapes: inputs ``[batch, seq]``, or pixels ``[batch, channels, height, width]``; labels ``[batch, seq]``,
``[batch, target]`` of another sequence, ``[batch]`` of classes, or ``[batch, 2]`` of answers.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flower_split.data.examples import NO_LOSS, Example
from flower_split.errors import DataError


def batches(
    examples: Sequence[Example], batch_size: int, *, seed: int, pad_token_id: int
) -> Iterator[dict[str, Tensor]]:
    """Return training batches without end, shuffled anew in every epoch.

    An epoch has ``ceil(len(examples) / batch_size)`` batches, the last one possibly smaller. The
    order depends on ``seed`` and the epoch's number alone.

    Returns:
        An iterator over dicts of ``input_ids`` and ``attention_mask``, of ``pixel_values``, or of both, and
        ``labels``.

    Raises:
        DataError: There are no examples (at once, not at the first batch).
    """
    if not examples:
        raise DataError("training needs at least one example; there is none. Give more data.")
    return _endless(examples, batch_size, seed, pad_token_id)


def _endless(
    examples: Sequence[Example], batch_size: int, seed: int, pad_token_id: int
) -> Iterator[dict[str, Tensor]]:
    epoch = 0
    while True:
        order = list(range(len(examples)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, len(order), batch_size):
            chosen = [examples[index] for index in order[start : start + batch_size]]
            yield collate(chosen, pad_token_id)
        epoch += 1


def eval_batches(
    examples: Sequence[Example], batch_size: int, pad_token_id: int
) -> Iterator[dict[str, Tensor]]:
    """Yield one pass over ``examples`` in their order, in batches as :func:`batches` gives them."""
    for start in range(0, len(examples), batch_size):
        yield collate(examples[start : start + batch_size], pad_token_id)


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Return one batch of examples of one form, padded on the right to the longest.

    Where labels are another sequence, the input is padded to its length too: a trunk takes no more
    labels than it sees positions.
    """
    seen = collate_images(examples)
    form = examples[0].form
    if seen and form == "record":
        return {**seen, "labels": torch.tensor([example.labels[0] for example in examples])}
    length = max(len(example.input_ids) for example in examples)
    target = max(len(example.labels) for example in examples)
    if form == "target":
        length = max(length, target)

    def padded(rows: list[list[int]], fill: int, to: int = length) -> Tensor:
        return torch.tensor([row + [fill] * (to - len(row)) for row in rows])

    labels = [example.labels for example in examples]
    batch = {
        "input_ids": padded([example.input_ids for example in examples], pad_token_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
        "labels": padded(labels, NO_LOSS, length if form == "tokens" else target),
    }
    if form == "record" and target == 1:
        batch["labels"] = batch["labels"][:, 0]
    for name in examples[0].kinds:
        batch[name] = padded([list(example.kinds[name]) for example in examples], 0)
    return {**batch, **seen}


def collate_images(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return what a model sees of the examples' pictures, joined; empty: there is none.

    Raises:
        DataError: The processor makes inputs of several sizes of them, which no batch can hold.
    """
    made = [example.image.inputs() for example in examples if example.image is not None]
    if not made:
        return {}
    try:
        return {name: torch.cat([each[name] for each in made]) for name in made[0]}
    except RuntimeError as error:
        raise DataError(
            f"pictures of one batch must have one size after the model's image processor: {error}. Set "
            "train.batch-size = 1, or give pictures of one size."
        ) from error
