"""Documents: one record of the data with its meaning, and the split into training and held-out.

A record is text (packed with its neighbours), a prompt with its completion (loss on the
completion), or a chat (loss on the assistant's turns). Which one follows from its fields.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from flower_split.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was read."""

    place: str  # where it stands, for error messages: "train.jsonl, line 3"
    content: Mapping[str, object]


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
class Chat:
    """A conversation as chat templates take it; the assistant's turns are learned."""

    place: str
    messages: Sequence[Mapping[str, object]]


Document: TypeAlias = Text | Completion | Chat


def parse_record(record: Record, text_field: str) -> Document | None:
    """The document that ``record`` is, or None if it is blank text.

    The fields decide: ``messages``, else ``prompt`` and ``completion``, else ``text_field``.

    Raises:
        DataError: A field is missing or has the wrong type; names place and field.
    """
    content, place = record.content, record.place
    if "messages" in content:
        return Chat(place, _messages(content["messages"], place))
    if "prompt" in content or "completion" in content:
        return Completion(place, _string(record, "prompt"), _string(record, "completion"))
    text = _string(record, text_field).strip()
    return Text(place, text) if text else None


def _string(record: Record, name: str) -> str:
    value = record.content.get(name)
    if not isinstance(value, str):
        fields = ", ".join(sorted(map(str, record.content))) or "none"
        found = "is missing" if name not in record.content else f"is a {type(value).__name__}"
        raise DataError(
            f"{record.place}: a record needs the string field {name!r}, which {found}; its fields "
            f"are {fields}. Use messages, prompt and completion, or name the field of the text in "
            "data.text-field."
        )
    return value


def _messages(value: object, place: str) -> list[dict[str, object]]:
    """Checked messages, without the nulls that columnar data sets fill in."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f'{place}: messages must be a list like [{{"role": "user", "content": "..."}}, ...] '
            f"with at least one turn; it is {value!r:.60}."
        )
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f'{place}: every message needs a "role" (system, user, assistant) and "content"; '
                f"one is {message!r:.60}."
            )
        filled = {str(key): item for key, item in message.items() if item is not None}
        messages.append({"content": "", **filled})
    return messages


def split_held_out(
    documents: Sequence[Document], fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split into training and held-out documents by a hash of seed and content.

    Equal documents always fall on the same side, on every client, so that no held-out text is
    trained on anywhere in the federation. ``fraction`` is therefore met on average; each side gets at
    least one document. Training documents keep their order; held-out ones come in that of their hash,
    so that an evaluation of the first few batches is a fair sample.

    Raises:
        DataError: There are not two different documents.
    """
    ranked = {_content(document): 0.0 for document in documents}
    if len(ranked) < 2:
        raise DataError(
            "training and held-out data need at least two different documents; there are "
            f"{len(ranked)} (of {len(documents)} in all). Give this client more data, or use fewer "
            "clients."
        )
    for content in ranked:
        digest = hashlib.sha256(f"{seed}\0{content}".encode()).digest()
        ranked[content] = int.from_bytes(digest[:8], "big") / 2**64
    ordered = sorted(ranked.values())
    # the threshold moves only where it would leave a side empty
    threshold = min(fraction, ordered[-1]) if fraction > ordered[0] else ordered[1]
    train = [document for document in documents if ranked[_content(document)] >= threshold]
    held_out = [document for document in documents if ranked[_content(document)] < threshold]
    held_out.sort(key=lambda document: ranked[_content(document)])
    return train, held_out


def _content(document: Document) -> str:
    """What makes two documents equal, wherever they stand."""
    match document:
        case Text(text=text):
            return text
        case Completion(prompt=prompt, completion=completion):
            return json.dumps([prompt, completion])
        case Chat(messages=messages):
            return json.dumps(messages, sort_keys=True, default=str)
