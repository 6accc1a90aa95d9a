"""A fuzz target as a value, and how one input is made of several parts."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).parent.parent / "corpus"
LONGEST = 1 << 16  # bytes of an input


class Found(AssertionError):
    """An input had an effect that none may have."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads what others wrote.

    Args:
        name: Of the target.
        documented: What it may raise.
        opened: Makes it ready; inside the block, its function takes one input after the other.
        corpus: Its folder in the corpus, where that is another target's too; empty: its name.
    """

    name: str
    documented: tuple[type[Exception], ...]
    opened: Callable[[], AbstractContextManager[Callable[[bytes], None]]]
    corpus: str = ""

    @property
    def folder(self) -> Path:
        """Where its inputs are kept."""
        return CORPUS / (self.corpus or self.name)


@contextmanager
def made_ready(target: Target) -> Iterator[Callable[[bytes], None]]:
    """A target's function, while the package's log goes nowhere."""
    logger, nowhere = logging.getLogger("flower_split"), logging.NullHandler()
    before = logger.propagate
    logger.addHandler(nowhere)
    logger.propagate = False
    try:
        with target.opened() as run:
            yield run
    finally:
        logger.propagate = before
        logger.removeHandler(nowhere)


def joined(parts: Sequence[bytes]) -> bytes:
    """Return an input of these parts: before each, its length in two bytes."""
    return b"".join(len(part).to_bytes(2, "little") + part for part in parts)


def parts_of(data: bytes) -> list[bytes]:
    """Return the parts of an input; any bytes are one. A length beyond the end takes what is left."""
    found, at = [], 0
    while at + 2 <= len(data):
        end = at + 2 + int.from_bytes(data[at : at + 2], "little")
        found.append(data[at + 2 : end])
        at = end
    return found


def mutated(chance: random.Random, data: bytes, within: int = 200) -> bytes:
    """Return bytes with one change among the first ``within``, or cut off anywhere."""
    found = bytearray(data)
    at = chance.randrange(min(len(found), within)) if found else 0
    match chance.randrange(5):
        case 0 | 1 if found:
            found[at] = chance.randrange(256)
        case 2:
            del found[at : at + chance.randrange(1, 9)]
        case 3:
            found[at:at] = chance.randbytes(chance.randrange(1, 12))
        case _:
            del found[chance.randrange(len(found) + 1) :]
    return bytes(found)


def variants(corpus: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield so many inputs that are nearly one of the corpus, or halves of two."""
    chance = random.Random(seed)
    for _ in range(count):
        data = chance.choice(corpus)
        if chance.randrange(8) == 0:
            other = chance.choice(corpus)
            data = data[: chance.randrange(len(data) + 1)] + other[len(other) // 2 :]
        for _ in range(chance.choice((1, 1, 2, 4))):
            data = mutated(chance, data, LONGEST)
        yield data[:LONGEST]
