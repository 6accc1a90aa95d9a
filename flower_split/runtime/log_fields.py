"""What this process is at work on, for every log line: experiment, Flower run, round, attempt, slot."""

import logging
import threading
from collections.abc import Mapping
from types import MappingProxyType

FIELDS = ("experiment", "run", "round", "attempt", "slot", "node")
"""Names of the fields, in the order in which lines show them."""

Field = str | int


class LogFields:
    """The fields of a process; a record's own come first. Thread-safe: replaced whole.

    There is one for a process (:data:`PROCESS_FIELDS`): a trunk serves one round at a time, a
    ServerApp runs one run, and a ClientApp answers one message at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fields: Mapping[str, Field] = MappingProxyType({})

    def bind(self, **fields: Field) -> None:
        """Set some fields; the others stay.

        Args:
            **fields: Of :data:`FIELDS`.
        """
        unknown = fields.keys() - set(FIELDS)
        if unknown:
            raise ValueError(f"log lines have the fields {FIELDS}; {sorted(unknown)} are none.")
        with self._lock:
            self._fields = MappingProxyType({**self._fields, **fields})

    def clear(self) -> None:
        """Forget all fields."""
        with self._lock:
            self._fields = MappingProxyType({})

    def now(self) -> Mapping[str, Field]:
        """Return the fields as they are."""
        return self._fields

    def of(self, record: logging.LogRecord) -> dict[str, Field]:
        """Return the fields of a line."""
        own = {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        merged = {**self._fields, **own}
        return {name: merged[name] for name in FIELDS if name in merged}


PROCESS_FIELDS = LogFields()
"""The fields of this process."""
