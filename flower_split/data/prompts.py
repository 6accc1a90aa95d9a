"""Prompts of held-out examples, for scores of what a model makes of them.

A prompt is all that comes before an example's last stretch of labels: before the completion, or before the
assistant's last turn. Packed running text has none.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flower_split.data.batches import collate_images
from flower_split.data.examples import NO_LOSS, Example

Prompts = tuple[dict[str, Tensor], list[list[int]]]
"""The model's inputs of one batch of prompts, and the tokens that should follow each."""


def prompt_batches(
    examples: Sequence[Example], batch_size: int, pad_token_id: int, limit: int
) -> Iterator[Prompts]:
    """Yield the prompts of examples in their order, padded on the left to the longest of a batch.

    Args:
        examples: Those without a prompt are passed over.
        batch_size: Prompts at once.
        pad_token_id: Any id; the mask leaves it out.
        limit: The most prompts; 0: all.
    """
    found = [(example, start) for example in examples if (start := prompt_length(example)) > 0]
    found = found[: limit or None]
    for first in range(0, len(found), batch_size):
        yield _collate(found[first : first + batch_size], pad_token_id)


def prompt_length(example: Example) -> int:
    """Return how many of an example's tokens are its prompt; 0: it has none."""
    if example.form == "target":
        return len(example.input_ids)
    if example.form == "record" or not example.labels or example.labels[-1] == NO_LOSS:
        return 0
    start = len(example.labels)
    while start and example.labels[start - 1] != NO_LOSS:
        start -= 1
    return start


def _collate(pairs: Sequence[tuple[Example, int]], pad_token_id: int) -> Prompts:
    longest = max(length for _, length in pairs)

    def padded(row: Sequence[int], length: int, fill: int) -> list[int]:
        return [fill] * (longest - length) + list(row[:length])

    rows = {
        "input_ids": [padded(example.input_ids, n, pad_token_id) for example, n in pairs],
        "attention_mask": [padded([1] * n, n, 0) for _, n in pairs],
    }
    for name in pairs[0][0].kinds:
        rows[name] = [padded(example.kinds[name], n, 0) for example, n in pairs]
    inputs = {name: torch.tensor(values) for name, values in rows.items()}
    wanted = [
        example.labels if example.form == "target" else example.labels[n:] for example, n in pairs
    ]
    return {**inputs, **collate_images([example for example, _ in pairs])}, wanted
