"""Documents: one record of the data with its meaning. :mod:`flower_split.data.formats` makes them.

A document is text (packed with its neighbours), a prompt with its completion (loss on the
completion), or a conversation (loss on the assistant's turns, or on what follows its prompt); of other
tasks than language modelling, a text with its class, words with theirs, a question with its answer, a
picture with its class, or one with a prompt and what should follow.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was read."""

    place: str  # where it stands, for error messages: "train.jsonl, line 3"
    content: Mapping[str, object]
    folder: str = ""  # where relative paths in it begin


@dataclass(frozen=True, slots=True)
class Text:
    """Running text; every token is learned."""

    place: str
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what should follow it; the completion is learned."""

    place: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """What a chat template is given beside the messages."""

    tools: Sequence[Mapping[str, object]] = field(default_factory=list)  # JSON schemas
    variables: Mapping[str, object] = field(default_factory=dict)  # chat_template_kwargs


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as chat templates take it; the assistant's turns are learned."""

    place: str
    messages: Sequence[Mapping[str, object]]
    unlearned: frozenset[int] = frozenset()  # indices of assistant's turns without loss
    options: TemplateOptions = TemplateOptions()


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """A conversation and the turns that should follow it; all of those are learned."""

    place: str
    prompt: Sequence[Mapping[str, object]]
    completion: Sequence[Mapping[str, object]]
    options: TemplateOptions = TemplateOptions()


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and its class."""

    place: str
    text: str
    label: int  # index of the class


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words, each with its class."""

    place: str
    words: tuple[str, ...]
    classes: tuple[int, ...]  # indices


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and where in a context its answer stands."""

    place: str
    question: str
    context: str
    start: int  # of the answer, in characters
    end: int  # behind its last


@dataclass(frozen=True, slots=True)
class Picture:
    """An image and its class."""

    place: str
    stored: Path | bytes  # an image file, or what it holds
    digest: str  # of what it holds
    label: int  # index of the class


@dataclass(frozen=True, slots=True)
class PictureCompletion:
    """An image with a prompt, and what should follow; the completion is learned."""

    place: str
    stored: Path | bytes  # an image file, or what it holds
    digest: str  # of what it holds
    prompt: str
    completion: str


Document: TypeAlias = (
    Text
    | Completion
    | Chat
    | ChatCompletion
    | Labelled
    | Tagged
    | Question
    | Picture
    | PictureCompletion
)


def content_of(document: Document) -> str:
    """Return what makes two documents equal, wherever they stand; labels are left out of it."""
    match document:
        case Text(text=text):
            return text
        case Completion(prompt=prompt, completion=completion):
            return json.dumps([prompt, completion])
        case Chat(messages=messages):
            return json.dumps(messages, sort_keys=True, default=str)
        case ChatCompletion(prompt=before, completion=after):
            return json.dumps([*before, *after], sort_keys=True, default=str)
        case Labelled(text=text):
            return text
        case Tagged(words=words):
            return json.dumps(words)
        case Question(question=question, context=context):
            return json.dumps([question, context])
        case Picture(digest=digest):
            return digest
        case PictureCompletion(digest=digest, prompt=prompt, completion=completion):
            return json.dumps([digest, prompt, completion])


def text_of_document(document: Document) -> str:
    """Return the words that a reader sees, for comparing documents by what they say."""
    match document:
        case Text(text=text):
            return text
        case Completion(prompt=prompt, completion=completion):
            return f"{prompt}\n{completion}"
        case Chat(messages=messages):
            return "\n".join(str(message.get("content", "")) for message in messages)
        case ChatCompletion(prompt=before, completion=after):
            return "\n".join(str(message.get("content", "")) for message in [*before, *after])
        case Labelled(text=text):
            return text
        case Tagged(words=words):
            return " ".join(words)
        case Question(question=question, context=context):
            return f"{question}\n{context}"
        case Picture(digest=digest):
            return digest  # equal pictures say the same; what others show is not compared
        case PictureCompletion(prompt=prompt, completion=completion):
            return f"{prompt}\n{completion}"
