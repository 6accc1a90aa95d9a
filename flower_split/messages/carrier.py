"""The ConfigRecord that carries this package's keys: found, checked, read with types, merged into.

A strategy or a mod of Flower's sees the one ConfigRecord that it knows, with further keys in it. The
format number in it is checked whenever something is read, so that two versions of this package never
half understand each other.
"""

from collections.abc import Mapping, Sequence
from typing import Never

from flwr.app import ConfigRecord, RecordDict

from flower_split.errors import FederationError
from flower_split.messages import keys
from flower_split.runtime.version import __version__

Value = (
    int
    | float
    | str
    | bytes
    | bool
    | list[int]
    | list[float]
    | list[str]
    | list[bytes]
    | list[bool]
)
"""What Flower's ConfigRecord holds."""

_REMEDY = "Run the same version of flower_split on every machine."


def stamped(values: Mapping[str, Value]) -> ConfigRecord:
    """Return a record of ``values``, with the format number and the version that wrote them."""
    return ConfigRecord(
        {
            **values,
            keys.FORMAT: keys.FORMAT_NUMBER,
            keys.READER: keys.OLDEST_READER,
            keys.VERSION: __version__,
        }
    )


def merged(content: RecordDict, values: Mapping[str, Value]) -> RecordDict:
    """Return a copy of ``content`` whose first ConfigRecord holds ``values`` too.

    Neither ``content`` nor its records are changed: Flower's strategies give all their messages the
    same ones, and log them, while a token is for one receiver only.
    """
    copied = RecordDict(dict(content.items()))
    name = next(iter(copied.config_records), keys.CONFIG)
    before = copied.config_records.get(name, ConfigRecord())
    copied[name] = stamped({**dict(before.items()), **values})
    return copied


class Fields:
    """The values of one ConfigRecord, read with their types.

    Args:
        record: The record.
        what: Names the message in errors, such as ``"a training order"``.
    """

    def __init__(self, record: Mapping[str, object], what: str) -> None:
        self._record = record
        self._what = what

    @classmethod
    def of(cls, content: RecordDict, what: str) -> "Fields":
        """Find the record of this package in ``content`` and check its format.

        Raises:
            FederationError: There is none, or it was written by a version with another format.
        """
        found = cls.find(content, what)
        if found is None:
            raise FederationError(
                f"{what} holds nothing of flower_split's. Use this package's ServerApp with its "
                f"ClientApp (flower_split.client.app). {_REMEDY}"
            )
        return found

    @classmethod
    def find(cls, content: RecordDict, what: str) -> "Fields | None":
        """Find the record as :meth:`of` does; return None where ``content`` holds none of ours.

        Raises:
            FederationError: It was written by a version with another format.
        """
        for record in content.config_records.values():
            if keys.FORMAT in record:
                check_format(record, what)
                return cls(record, what)
        return None

    def has(self, key: str) -> bool:
        """Return whether there is a value."""
        return key in self._record

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string.

        Raises:
            FederationError: It is missing without a default, or of another type.
        """
        value = self._get(key, default)
        return value if isinstance(value, str) else self._refuse(key, value, "a string")

    def count(self, key: str, default: int | None = None) -> int:
        """Return an integer; raises as :meth:`text` does."""
        value = self._get(key, default)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        return self._refuse(key, value, "an integer")

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number; raises as :meth:`text` does."""
        value = self._get(key, default)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        return self._refuse(key, value, "a number")

    def flag(self, key: str) -> bool:
        """Return a truth value, False where there is none; raises as :meth:`text` does."""
        value = self._get(key, False)
        return value if isinstance(value, bool) else self._refuse(key, value, "true or false")

    def names(self, key: str) -> tuple[str, ...]:
        """Return strings; raises as :meth:`text` does."""
        value = self._get(key, None)
        if isinstance(value, list):
            return tuple(str(name) for name in value)
        return self._refuse(key, value, "a list of names")

    def under(self, prefix: str) -> dict[str, object]:
        """Return all values whose keys begin with ``prefix``, by the rest of their keys."""
        return {
            key.removeprefix(prefix): value
            for key, value in self._record.items()
            if key.startswith(prefix)
        }

    def _get(self, key: str, default: object) -> object:
        value = self._record.get(key, default)
        return self._refuse(key, "nothing", "there") if value is None else value

    def _refuse(self, key: str, value: object, expected: str) -> Never:
        raise FederationError(
            f"{self._what} cannot be read: {key} must be {expected}; it is {value!r}. {_REMEDY}"
        )


def check_format(record: Mapping[str, object], what: str) -> None:
    """Check that this version reads the format of a record, and that its writer says so of a newer one.

    Raises:
        FederationError: It does not; both versions are named, and which is too old.
    """
    number = record.get(keys.FORMAT)
    reader = record.get(keys.READER, number)
    if not isinstance(number, int) or not isinstance(reader, int):
        remedy = _REMEDY
    elif reader > keys.FORMAT_NUMBER:
        remedy = f"Upgrade flower_split {__version__} where it is read."
    elif number < keys.OLDEST_READ:
        remedy = "Upgrade flower_split where it was written."
    else:
        return
    raise FederationError(
        f"{what} was written in format {number} by flower_split {record.get(keys.VERSION, 'unknown')}, "
        f"for readers of format {reader} and later; flower_split {__version__} reads formats "
        f"{keys.OLDEST_READ} to {keys.FORMAT_NUMBER}. {remedy}"
    )


def numbers_of(values: Sequence[object]) -> list[float]:
    """Return the numbers among ``values``."""
    return [value for value in values if isinstance(value, (int, float))]
