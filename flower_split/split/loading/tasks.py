"""What a task asks of a checkpoint: which of transformers' auto classes loads it, and what head it gets.

A head that the checkpoint lacks begins with values drawn from its names alone, so that it is the same on
every machine, whatever else a part holds.
"""

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from flower_split.config.model import (
    CAUSAL_LM,
    IMAGE_CLASSIFICATION,
    IMAGE_TEXT_TO_TEXT,
    MASKED_LM,
    QUESTION_ANSWERING,
    SEQ2SEQ,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)

AUTO_CLASSES: Mapping[str, type[_BaseAutoModelClass]] = {
    CAUSAL_LM: AutoModelForCausalLM,
    SEQ2SEQ: AutoModelForSeq2SeqLM,
    SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
    TOKEN_CLASSIFICATION: AutoModelForTokenClassification,
    QUESTION_ANSWERING: AutoModelForQuestionAnswering,
    MASKED_LM: AutoModelForMaskedLM,
    IMAGE_CLASSIFICATION: AutoModelForImageClassification,
    IMAGE_TEXT_TO_TEXT: AutoModelForImageTextToText,
}
"""``model.task`` -> the auto class of transformers."""


def set_labels(config: PreTrainedConfig, labels: Collection[str]) -> None:
    """Give a model's configuration the classes of a classification, and what its head needs for them."""
    config.id2label = dict(enumerate(labels))  # num_labels is its length
    config.label2id = {name: index for index, name in enumerate(labels)}
    if getattr(config, "pad_token_id", None) is None:  # by which a decoder finds a row's last token
        end = getattr(config, "eos_token_id", None)
        config.pad_token_id = end[0] if isinstance(end, list) else end


@torch.no_grad()
def begin_head(model: PreTrainedModel, missing: Collection[str]) -> None:
    """Draw the weights that a checkpoint lacks anew, from their names alone.

    Matrices are normal with the configuration's ``initializer_range``; vectors, biases and norms, stay
    as transformers has made them, zeros or ones.

    Args:
        model: As it was loaded.
        missing: Names of parameters.
    """
    text_config = model.config.get_text_config()
    spread = float(getattr(text_config, "initializer_range", 0.02))
    for name in sorted(missing):
        parameter = model.get_parameter(name)
        if parameter.dim() < 2 or parameter.is_meta:
            continue
        digest = hashlib.blake2b(f"head/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


def head_modules(model: nn.Module) -> list[str]:
    """Return what a task puts on top of the base model, such as ``score`` or ``qa_outputs``.

    Those are the modules beside the base model and the output embedding, and the base model's
    ``pooler``, which only classifiers use.
    """
    prefix = getattr(model, "base_model_prefix", "")
    get_output = getattr(model, "get_output_embeddings", None)
    output = None if get_output is None else get_output()
    found = []
    for name, child in model.named_children():
        if name == prefix:
            found += [f"{name}.{inner}" for inner, _ in child.named_children() if inner == "pooler"]
        elif child is not output:
            found.append(name)
    return [name for name in found if any(True for _ in model.get_submodule(name).parameters())]
