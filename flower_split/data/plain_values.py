"""Values of records as JSON has them: nulls taken out, text checked, JSON in strings decoded."""

import json
import re
from collections.abc import Mapping, Sequence

from flower_split.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")


def without_nulls(value: object) -> object:
    """Return ``value`` without the fields that are null, at every depth.

    Columnar data sets fill every field that a record lacks with null, also inside of tool calls, so
    a null field means an absent one, as in TRL and in transformers' chat templates. Items of lists
    stay, whatever they are.
    """
    if isinstance(value, Mapping):
        return {str(key): without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [without_nulls(item) for item in value]
    return value


def check_text(value: object, place: str, field: str) -> None:
    """Check that every string in ``value``, at every depth, is text that UTF-8 can hold.

    Args:
        value: A field's value.
        place: The record, for the error.
        field: The field's name, for the error.

    Raises:
        DataError: A string holds half of a surrogate pair, as an escape in JSON may give.
    """
    if isinstance(value, str):
        found = _SURROGATE.search(value)
        if found is not None:
            raise DataError(
                f"{place}: text must be valid Unicode; character {found.start()} of {field} is "
                f"U+{ord(found.group()):04X}, half of a surrogate pair, which no tokenizer takes. "
                'Correct or remove the record, or set data.on-bad-record = "skip".'
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_text(key, place, f"a name in {field}")
            check_text(item, place, f"{field}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for index, item in enumerate(value):
            check_text(item, place, f"{field}[{index}]")


def decoded(value: object, place: str, field: str) -> object:
    """Return ``value``; if it is a string that holds a JSON object or array, what that holds.

    CSV and many parquet files keep lists of messages and of tools as JSON text.

    Raises:
        DataError: It looks like JSON and does not parse.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: {field} is text that begins as JSON and does not parse: {error}. Correct or "
            "remove the record."
        ) from error
