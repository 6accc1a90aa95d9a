"""JSON from files and peers: what is wrong with it is a ValueError of one line, whatever it is."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")


def read_json_text(text: str | bytes) -> object:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is none, or is nested too deeply to be read. The message has no part of the text.
    """
    try:
        value: object = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: byte {error.start} cannot be read") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def read_json_object(text: str | bytes) -> dict[str, object]:
    """Return the object of a JSON text.

    Raises:
        ValueError: It is none.
    """
    value = read_json_text(text)
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object; it is a {type(value).__name__}")
    return value


def record_of(kind: type[Record], values: object) -> Record:
    """Return a dataclass of texts and integers from a JSON object with its fields, and no others.

    Raises:
        ValueError: It is no object, a field is missing, of another type, or unknown; names the field.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"it must be a JSON object; it is a {type(values).__name__}")
    wanted = {field.name: field.type for field in fields(kind)}
    for name, wants in wanted.items():
        if name not in values:
            raise ValueError(f"{name!r} is missing")
        if type(values[name]) is not wants:  # a boolean is no integer here
            raise ValueError(f"{name!r} must be {'text' if wants is str else 'an integer'}")
    for name in values:
        if name not in wanted:
            raise ValueError(f"{str(name)[:40]!r} is unknown")
    return kind(**values)


def plain_file_name(name: str) -> str:
    """Return the name of a file that lies beside the one which names it.

    Raises:
        ValueError: It leads to another directory, or is no name.
    """
    if not name or name in (".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"a file's name must be without a directory; it is {name[:80]!r}")
    return name
