"""Image classification: a class for each picture, by the model's own image processor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from flower_split.config import ModelConfig
from flower_split.data.documents import Document, Picture, Record
from flower_split.data.examples import Example
from flower_split.data.tally import Tally
from flower_split.data.tasks.classification import class_of
from flower_split.data.tasks.pictures import Stored, decode, read_picture, undecodable
from flower_split.data.tasks.task import DataTask, fields_of
from flower_split.errors import ConfigError
from flower_split.split.loading.model_source import ModelSource


class Processor(Protocol):
    """An image processor of transformers."""

    def __call__(self, images: object, *, return_tensors: str) -> Mapping[str, Tensor]:
        """Return ``pixel_values`` ``[1, channels, height, width]`` of one image."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A picture as it is stored; it is decoded anew for every batch, always to the same numbers."""

    stored: Stored
    processor: Processor

    def inputs(self) -> Mapping[str, Tensor]:
        """Return ``pixel_values``, ``[1, channels, height, width]``.

        Raises:
            OSError: It is gone, or is no picture.
        """
        made = self.processor(decode(self.stored), return_tensors="pt")
        return {"pixel_values": torch.as_tensor(made["pixel_values"])}


class ImageClassification(DataTask):
    """``image-classification``: one class for a picture, which a record holds or gives the path of."""

    def document(self, record: Record, text_field: str, ignored: frozenset[str]) -> Document | None:
        """Return a picture with its class, by index; see :class:`DataTask`."""
        data, place = self.config.data, record.place
        wanted = (data.image_field, data.label_field)
        fields = fields_of(record, wanted, ignored, self.config.model.task)
        stored, digest = read_picture(fields[data.image_field], record, data.image_field)
        label = class_of(fields[data.label_field], self.config.model.label_names, place)
        return Picture(place, stored, digest, label)

    def examples(self, documents: Sequence[Document], tally: Tally) -> list[Example]:
        """Return an example for each picture; each is decoded once, to know that it can be.

        Raises:
            ConfigError: The model has no image processor, or Pillow is not installed.
        """
        processor, made = load_image_processor(self.config.model), []
        for document in documents:
            assert isinstance(document, Picture)
            image = StoredImage(document.stored, processor)
            try:
                image.inputs()
            except (OSError, ValueError) as error:
                tally.bad(undecodable(document.place, error))
                continue
            made.append(Example([], [document.label], form="record", image=image))
        return made


def load_image_processor(config: ModelConfig) -> Processor:
    """Return the model's image processor.

    Raises:
        ConfigError: There is none at ``model.name``, or a library is missing.
    """
    source = ModelSource.of(config)
    try:
        load = cast(Callable[..., object], AutoImageProcessor.from_pretrained)
        found = load(source.name_or_path, revision=source.revision)
    except ImportError as error:
        raise ConfigError(
            "image-classification needs Pillow, which is not installed. Install it: "
            "pip install 'flower-split[images]'."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name must have an image processor; {config.name!r} gives none: {error} Check "
            "model.name and model.revision: a directory with preprocessor_config.json, or a hub id."
        ) from error
    return cast(Processor, found)
