"""A tiny batch for a model of any task: text with padded rows, images, or both.

A vision-language model gets images where one of these recipes fits it: pictures of the configured
size, with or without their sizes or a dimension for several, or patches with a grid. The number of
image tokens is what its vision tower returns.
"""

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.support.tiny_models import VOCAB_SIZE, padded_batch

Batch = dict[str, Tensor]

_EOS = 2
IMAGE_TOKEN = VOCAB_SIZE - 4


def text_batch(model: PreTrainedModel) -> Batch:
    """Ids and mask; every row has one end token; boxes where the model takes them."""
    batch = padded_batch()
    batch["input_ids"][:, 6] = _EOS
    del batch["labels"]
    if "bbox" in inspect.signature(type(model).forward).parameters:
        batch["bbox"] = torch.zeros(*batch["input_ids"].shape, 4, dtype=torch.long)
    return batch


def causal_lm(model: PreTrainedModel) -> Iterator[tuple[str, Batch]]:
    """Next tokens."""
    yield "", padded_batch()


def sequence_classification(model: PreTrainedModel) -> Iterator[tuple[str, Batch]]:
    """A class per row."""
    yield "", text_batch(model) | {"labels": torch.tensor([0, 1, 1])}


def token_classification(model: PreTrainedModel) -> Iterator[tuple[str, Batch]]:
    """A class per token."""
    batch = text_batch(model)
    yield "", batch | {"labels": batch["input_ids"] % 2}


def question_answering(model: PreTrainedModel) -> Iterator[tuple[str, Batch]]:
    """A span per row."""
    start = torch.tensor([3, 4, 4])
    yield "", text_batch(model) | {"start_positions": start, "end_positions": start + 1}


def masked_lm(model: PreTrainedModel) -> Iterator[tuple[str, Batch]]:
    """The tokens themselves; padding does not count."""
    batch = text_batch(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    yield "", batch | {"labels": labels}


def seq2seq(model: PreTrainedModel) -> Iterator[tuple[str, Batch]]:
    """Another text per row."""
    batch = text_batch(model)
    yield "", batch | {"labels": batch["input_ids"].flip(1).clamp_min(3)}


def image_classification(model: PreTrainedModel) -> Iterator[tuple[str, Batch]]:
    """A class per image."""
    yield "", {"pixel_values": _pixels(model.config, 3), "labels": torch.tensor([0, 1, 1])}


def image_text_to_text(model: PreTrainedModel) -> Iterator[tuple[str, Batch]]:
    """Text after one image per row; failing that, text alone."""
    pictures = _pictures(model.config)
    sizes = torch.tensor([pictures["pixel_values"].shape[-2:]] * 3)
    recipes = [
        _grid_pictures(model.config),
        pictures,
        pictures | {"image_sizes": sizes},
        {"pixel_values": pictures["pixel_values"][:, None]},
    ]
    for recipe in recipes:
        try:
            features = _image_features(model, recipe)
        except Exception:  # this recipe is not the family's
            continue
        if len(features) % 3 == 0:
            yield "with images", _with_images(model, recipe, len(features) // 3)
    batch = padded_batch()
    if model.config.is_encoder_decoder:
        batch["labels"] = batch["input_ids"].flip(1).clamp_min(3)
    if not hasattr(model.base_model, "get_image_features"):
        yield "with images", batch | pictures  # which the layers look at, or which are the text
    yield "text alone", batch


def _with_images(model: PreTrainedModel, pictures: Batch, count: int) -> Batch:
    """Rows of ``count`` image tokens and text; the first row left-padded, the second right-padded."""
    text = padded_batch()
    image = torch.full((3, count), IMAGE_TOKEN)
    start = [3, 0, 0]  # of the image within each row's text
    rows = [
        torch.cat([t[:s], i, t[s:]])
        for t, i, s in zip(text["input_ids"], image, start, strict=True)
    ]
    ids = torch.stack(rows)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, **pictures}
    batch["labels"] = ids.masked_fill((mask == 0) | (ids == IMAGE_TOKEN), -100)
    kinds = (ids == IMAGE_TOKEN).long()
    for module in (model, getattr(model, "model", model)):
        accepted = inspect.signature(type(module).forward).parameters
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in accepted:
                return batch | {name: kinds}
    return batch


def _image_features(model: PreTrainedModel, pictures: Batch) -> Tensor:
    """``[tokens of all images, hidden]``."""
    base = model if hasattr(model, "get_image_features") else model.base_model
    with torch.no_grad():
        features = base.get_image_features(**pictures)
    features = getattr(features, "pooler_output", features)
    if isinstance(features, (tuple, list)):
        features = torch.cat([part.flatten(0, -2) for part in features])
    return features.flatten(0, -2)


def _vision(config: PreTrainedConfig) -> PreTrainedConfig:
    return getattr(config, "vision_config", None) or config


def _pictures(config: PreTrainedConfig) -> Batch:
    return {"pixel_values": _pixels(_vision(config), 3)}


def _grid_pictures(config: PreTrainedConfig) -> Batch:
    """Three images of 4 x 4 patches each, as patches of all of them one after another."""
    vision = _vision(config)
    patch = getattr(vision, "patch_size", 4)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    width = channels * getattr(vision, "temporal_patch_size", 1) * patch * patch
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(3 * 16, width, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * 3)}


def _pixels(config: PreTrainedConfig, count: int) -> Tensor:
    size = getattr(config, "image_size", None) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (count, getattr(config, "num_channels", None) or 3, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))
