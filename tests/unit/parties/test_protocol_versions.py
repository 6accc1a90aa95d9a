"""Ranges of protocol versions: who can speak with whom, and who is told to upgrade."""

import pytest

from flower_split.config import RunConfig
from flower_split.parties.fingerprint import differing_fields, settings
from flower_split.parties.protocol_versions import (
    ProtocolVersions,
    protocol_problem,
    protocols_meet,
)


@pytest.mark.parametrize(
    ("mine", "theirs", "meet"),
    [
        ("2", "2", True),
        ("2", "2-4", True),
        ("2-3", "3-4", True),
        ("2", "3", False),
        ("1-2", "3-4", False),
        ("2", "3-2", False),  # no range
        ("2", "two", False),
        ("", "2", False),
    ],
)
def test_protocols_meet_where_their_ranges_overlap(mine: str, theirs: str, meet: bool) -> None:
    assert protocols_meet({"protocol": mine}, {"protocol": theirs}) is meet
    assert protocols_meet({"protocol": theirs}, {"protocol": mine}) is meet
    assert differing_fields({"protocol": mine}, {"protocol": theirs}) == (
        [] if meet else ["protocol"]
    )


def test_protocol_problem_says_which_party_to_upgrade() -> None:
    older, newer = {"protocol": "1-2"}, {"protocol": "3"}
    assert protocol_problem(older, newer, ("the trunk", "the client")) == (
        "the trunk speaks protocol 1-2, the client 3. Upgrade flower-split of the trunk."
    )
    assert protocol_problem(newer, older, ("the trunk", "the client")) == (
        "the trunk speaks protocol 3, the client 1-2. Upgrade flower-split of the client."
    )
    assert protocol_problem(newer, newer, ("the trunk", "the client")) == ""


def test_a_run_speaks_one_range_that_can_be_read() -> None:
    assert ProtocolVersions.of(settings(RunConfig())) == ProtocolVersions(2, 2)
