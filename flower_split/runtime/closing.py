"""A base for what is used in a ``with`` block and closed at its end."""

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Self


class Closing(AbstractContextManager["Closing"]):
    """Calls :meth:`close` at the end of a ``with`` block, however it ends."""

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close; what was raised inside passes through."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Idempotent."""
