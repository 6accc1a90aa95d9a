"""Vision and language: what should follow a picture and a prompt, by the model's own processor.

The processor puts as many image tokens into the prompt as the picture becomes positions; it tokenises the
prompt by its chat template, or, where it has none, with the image token before it. Nothing of them is
learned, only the completion.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import AutoProcessor

from flower_split.config import ModelConfig
from flower_split.data.documents import Document, PictureCompletion, Record
from flower_split.data.examples import NO_LOSS, Example
from flower_split.data.tally import Tally
from flower_split.data.tasks.pictures import Stored, decode, read_picture, undecodable
from flower_split.data.tasks.task import DataTask, count_cut, fields_of, string_of
from flower_split.errors import ConfigError, DataError
from flower_split.split.loading.model_source import ModelSource

_IDS, _MASK = "input_ids", "attention_mask"
_TEXTS = ("prompt", "completion")


class TextAndImages(Protocol):
    """A processor of transformers that takes a text and a picture together."""

    chat_template: str | None

    def __call__(
        self, *, images: object, text: list[str], return_tensors: str
    ) -> Mapping[str, Tensor]:
        """Return the model's inputs of one text ``[1, seq]`` and its picture."""

    def apply_chat_template(
        self, conversation: object, *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Return a conversation as text."""


@dataclass(frozen=True, slots=True)
class ImageInPrompt:
    """A picture as it is stored, and the prompt that it stands in."""

    stored: Stored
    text: str  # with the image token
    processor: TextAndImages

    def encoded(self) -> Mapping[str, Tensor]:
        """Return all of the model's inputs, of the prompt's tokens and of the picture.

        Raises:
            OSError: The picture is gone, or is none.
        """
        made = self.processor(images=decode(self.stored), text=[self.text], return_tensors="pt")
        return {name: torch.as_tensor(tensor) for name, tensor in made.items()}

    def inputs(self) -> Mapping[str, Tensor]:
        """Return what the picture becomes, without the tokens' own inputs."""
        encoded = self.encoded()
        return {name: tensor for name, tensor in encoded.items() if not _of_tokens(tensor, encoded)}


class ImageTextToText(DataTask):
    """``image-text-to-text``: the completion of a prompt about a picture."""

    def document(self, record: Record, text_field: str, ignored: frozenset[str]) -> Document | None:
        """Return picture, prompt and completion; see :class:`DataTask`."""
        field, place = self.config.data.image_field, record.place
        fields = fields_of(record, (field, *_TEXTS), ignored, self.config.model.task)
        stored, digest = read_picture(fields[field], record, field)
        prompt, completion = (string_of(fields, name, place) for name in _TEXTS)
        return PictureCompletion(place, stored, digest, prompt, completion)

    def examples(self, documents: Sequence[Document], tally: Tally) -> list[Example]:
        """Return an example for each picture; completions are cut at their ends.

        A picture that cannot be decoded, or leaves no room for the completion, is given to the tally.

        Raises:
            ConfigError: The model has no processor of text and images, or Pillow is not installed.
        """
        processor, made = load_processor(self.config.model), []
        for document in documents:
            assert isinstance(document, PictureCompletion)
            try:
                made.append(self._example(document, processor, tally))
            except DataError as error:
                tally.bad(error)
        return made

    def _example(
        self, document: PictureCompletion, processor: TextAndImages, tally: Tally
    ) -> Example:
        image = ImageInPrompt(document.stored, self._text(document.prompt, processor), processor)
        try:
            encoded = image.encoded()
        except (OSError, ValueError) as error:
            raise undecodable(document.place, error) from error
        end = self.tokenizer.eos_token_id
        prompt = cast(list[int], encoded[_IDS][0].tolist())
        if prompt and prompt[-1] == end:
            prompt = prompt[:-1]  # some tokenizers end every text by themselves
        answer = self.tokenizer(document.completion, add_special_tokens=False, verbose=False)
        completion = cast(list[int], answer["input_ids"])
        completion += [end] if isinstance(end, int) and completion[-1:] != [end] else []
        room = self.length - len(prompt)
        if room < 1:
            raise DataError(
                f"{document.place}: picture and prompt take {len(prompt)} positions, and none of the "
                f"{self.length} (train.sequence-length) is left for the completion. Raise that."
            )
        count_cut(tally, len(completion) - room)
        completion = completion[:room]
        kinds = {
            name: [*tensor[0].tolist()[: len(prompt)], *[0] * len(completion)]
            for name, tensor in encoded.items()
            if name not in (_IDS, _MASK) and _of_tokens(tensor, encoded)
        }
        labels = [NO_LOSS] * len(prompt) + completion
        return Example([*prompt, *completion], labels, kinds=kinds, image=image)

    def _text(self, prompt: str, processor: TextAndImages) -> str:
        """Return the prompt with the picture's place in it."""
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            return processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        token = getattr(processor, "image_token", None)
        if not isinstance(token, str):
            raise ConfigError(
                f"the processor of {self.config.model.name!r} must have a chat template or an image "
                "token, which say where a picture stands; it has neither. Save the model with the "
                "processor that it was trained with."
            )
        return f"{token}\n{prompt}"


def load_processor(config: ModelConfig) -> TextAndImages:
    """Return the model's processor of text and images.

    Raises:
        ConfigError: There is none at ``model.name``, or a library is missing.
    """
    source = ModelSource.of(config)
    try:
        load = cast(Callable[..., object], AutoProcessor.from_pretrained)
        found = load(source.name_or_path, revision=source.revision)
    except ImportError as error:
        raise ConfigError(
            f"the processor of {config.name!r} needs a library that is not installed: {error} Install "
            "it; Pillow is in pip install 'flower-split[images]'."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name must have a processor of text and images; {config.name!r} gives none: {error} "
            "Check model.name and model.revision: a directory with processor_config.json, or a hub id."
        ) from error
    if not hasattr(found, "image_processor"):
        raise ConfigError(
            f"model.name must have a processor of text and images; that of {config.name!r} is a "
            f"{type(found).__name__}. Check model.name, or set another model.task."
        )
    return cast(TextAndImages, found)


def _of_tokens(tensor: Tensor, encoded: Mapping[str, Tensor]) -> bool:
    """Return whether a tensor has a number for each token: ids, mask, or their kinds."""
    return tensor.shape == encoded[_IDS].shape and not tensor.is_floating_point()
