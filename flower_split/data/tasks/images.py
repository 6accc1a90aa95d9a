"""Image classification: a class for each picture, by the model's own image processor."""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from flower_split.config import ModelConfig
from flower_split.data.documents import Document, Picture, Record
from flower_split.data.examples import Example
from flower_split.data.tally import Tally
from flower_split.data.tasks.classification import class_of
from flower_split.data.tasks.task import DataTask, fields_of
from flower_split.errors import ConfigError, DataError
from flower_split.split.loading.model_source import ModelSource


class Processor(Protocol):
    """An image processor of transformers."""

    def __call__(self, images: object, *, return_tensors: str) -> Mapping[str, Tensor]:
        """Return ``pixel_values`` ``[1, channels, height, width]`` of one image."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A picture as it is stored; it is decoded anew for every batch, always to the same numbers."""

    stored: Path | bytes
    processor: Processor

    def pixels(self) -> Tensor:
        """Return what the model sees, ``[channels, height, width]``.

        Raises:
            OSError: It is gone, or is no picture.
        """
        from PIL import Image  # of the extra "images"

        given = self.stored if isinstance(self.stored, Path) else io.BytesIO(self.stored)
        with Image.open(given) as image:
            made = self.processor(image.convert("RGB"), return_tensors="pt")
        return torch.as_tensor(made["pixel_values"])[0]


class ImageClassification(DataTask):
    """``image-classification``: one class for a picture, which a record holds or gives the path of."""

    def document(self, record: Record, text_field: str, ignored: frozenset[str]) -> Document | None:
        """Return a picture with its class, by index; see :class:`DataTask`."""
        data, place = self.config.data, record.place
        wanted = (data.image_field, data.label_field)
        fields = fields_of(record, wanted, ignored, self.config.model.task)
        stored = _stored(fields[data.image_field], record)
        content = stored
        if isinstance(stored, Path):
            try:
                content = stored.read_bytes()
            except OSError as error:
                raise DataError(
                    f"{place}: the image {stored} cannot be read: {error.strerror}. A path in "
                    f"{data.image_field!r} begins at the folder of the file that holds the record, "
                    "unless it is absolute. Correct it."
                ) from error
        assert isinstance(content, bytes)
        digest = hashlib.sha256(content).hexdigest()
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
                image.pixels()
            except (OSError, ValueError) as error:
                tally.bad(
                    DataError(
                        f"{document.place}: the image cannot be decoded: {error}. Correct or remove the "
                        'record, or set data.on-bad-record = "skip".'
                    )
                )
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


def _stored(value: object, record: Record) -> Path | bytes:
    """Return a picture's bytes, or its path.

    Raises:
        DataError: The field holds neither.
    """
    if isinstance(value, Mapping):  # as datasets stores images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value:
        return Path(record.folder, value).expanduser()
    raise DataError(
        f"{record.place}: an image must be a path, or the bytes of an image file; it is {value!r:.60}. "
        "Correct the record or data.image-field."
    )
