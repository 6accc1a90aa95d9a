"""A sample of the attacks in every run; ``python -m tests.hostile`` runs all of them, with figures."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests.hostile.arena import Arena, trunk_apart, trunk_here
from tests.hostile.attacks import ATTACKS

SAMPLE = (
    "denominator-1e300",
    "gradient-with-nan",
    "260-silent-Backward-no-credential",
    "200-silent-Forward-no-credential",
    "silent-WaitVersion",
    "192-forwards-wait-for-a-version",
    "evaluations-in-a-training-round",
    "forward-with-layer_argument/self",
    "a-payload-too-short",
    "CloseSession-in-the-honest-session",
)


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    torch.set_num_threads(1)
    with trunk_here() as made:
        yield made


@pytest.mark.parametrize("name", SAMPLE)
def test_attack_happens_and_the_honest_client_never_notices(arena: Arena, name: str) -> None:
    (attack,) = (item for item in ATTACKS if item.name.endswith(name))
    outcome = arena.run(attack, tries=1)
    # Trunk, attacker and honest client share this process: its seconds and memory say nothing.
    assert arena.verdict(outcome, timed=False) == []


def test_attacks_are_named_once_and_of_every_kind() -> None:
    assert max(Counter(item.name for item in ATTACKS).values()) == 1
    assert len(ATTACKS) >= 60
    kinds = {"numbers", "strangers", "memory", "members", "arguments", "credentials"}
    assert {item.point for item in ATTACKS} == kinds


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_no_attack_of_all_succeeds() -> None:
    torch.set_num_threads(1)
    with trunk_apart() as apart:
        for attack in ATTACKS:
            assert apart.verdict(apart.run(attack)) == [], attack.name
