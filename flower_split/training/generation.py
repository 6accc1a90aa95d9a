"""Texts that a model makes of held-out prompts, and the sums that they are scored by.

Shapes: a prompt's ``input_ids`` and ``attention_mask`` ``[batch, seq]``, padded on the left, so that every
row's next token is at its end.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from flower_split.config.evaluation import EvaluationConfig
from flower_split.errors import DataError
from flower_split.training.scores import add
from flower_split.training.text_scores import sums_of_texts

Prompts = tuple[Mapping[str, Tensor], Sequence[Sequence[int]]]
"""The model's inputs of one batch of prompts, and the tokens that should follow each."""


@torch.no_grad()
def score_texts(
    model: PreTrainedModel,
    prompts: Iterable[Prompts],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
) -> dict[str, float]:
    """Return the sums of ``evaluation.text-scores`` over prompts.

    Args:
        model: The client's model with its trunk, or a whole model.
        prompts: Held-out.
        tokenizer: The model's; it makes text of tokens, special ones left out.
        config: Which scores, and how long a text may be.

    Raises:
        DataError: There is no prompt.
        TrunkError: The trunk refused or did not answer in time.
    """
    model.train(False)
    settings = _greedy(model, tokenizer, config.max_new_tokens)
    sums: dict[str, float] = {}
    for given, following in prompts:
        inputs = {name: tensor.to(model.device) for name, tensor in given.items()}
        generate = cast(Callable[..., Tensor], model.generate)
        made = generate(**inputs, generation_config=settings)
        if not model.config.is_encoder_decoder:
            made = made[:, given["input_ids"].shape[1] :]
        found = [tokenizer.decode(row, skip_special_tokens=True) for row in made]
        wanted = [tokenizer.decode(list(row), skip_special_tokens=True) for row in following]
        add(sums, sums_of_texts(cast(list[str], found), cast(list[str], wanted), config.names))
    if not sums:
        raise DataError(
            "evaluation.text-scores needs held-out records with a prompt, and there is none: running "
            "text has no end to compare with. Give prompts with completions or conversations, or leave "
            "evaluation.text-scores out."
        )
    return sums


def _greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Return the model's own settings of generation, with the likeliest token each time."""
    settings = copy.deepcopy(model.generation_config)
    settings.do_sample, settings.num_beams = False, 1
    settings.temperature = settings.top_p = settings.top_k = None
    settings.max_new_tokens, settings.max_length = max_new_tokens, None
    settings.pad_token_id = tokenizer.pad_token_id
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    return settings
