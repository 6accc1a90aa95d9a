"""Plays inputs to targets, and names the one that a target did not stand."""

from collections import Counter
from collections.abc import Iterable
from types import MappingProxyType

from tests.hostile.targets.files import (
    AUDIT_LOG,
    CHECKPOINT,
    MANIFEST,
    PRIVATE_FACTORS,
    RUN_DIRECTORY,
)
from tests.hostile.targets.messages import CODEC, FRAMES
from tests.hostile.targets.servicer import MEMBER, STRANGER
from tests.hostile.targets.target import Target, made_ready

TARGETS = MappingProxyType(
    {
        target.name: target
        for target in (
            CODEC,
            FRAMES,
            MEMBER,
            STRANGER,
            MANIFEST,
            CHECKPOINT,
            RUN_DIRECTORY,
            PRIVATE_FACTORS,
            AUDIT_LOG,
        )
    }
)


def corpus_of(target: Target) -> dict[str, bytes]:
    """Return the inputs that are kept for a target, by name."""
    return {path.name: path.read_bytes() for path in sorted(target.folder.iterdir())}


def play(target: Target, inputs: Iterable[tuple[str, bytes]]) -> Counter[str]:
    """Play named inputs; return how many were accepted, and refused with which documented error.

    Raises:
        AssertionError: One had another end; its bytes are in the message, in hexadecimal.
    """
    outcomes: Counter[str] = Counter()
    with made_ready(target) as run:
        for name, data in inputs:
            try:
                run(data)
                outcomes["accepted"] += 1
            except target.documented as error:
                outcomes[type(error).__name__] += 1
            except Exception as error:
                raise AssertionError(f"{target.name} did not stand {name}: {data.hex()}") from error
    return outcomes
