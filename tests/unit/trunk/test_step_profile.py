"""How far one optimizer step travels through the package, counted on a real step over loopback."""

from pathlib import Path

import pytest

from tests.support.step_profile import StepProfile, profile_step

PAGE = Path(__file__).parents[3] / "docs" / "training-step.md"


@pytest.fixture(scope="module")
def profile() -> StepProfile:
    """The shortest of three: how threads take turns is not the package's."""
    return min((profile_step() for _ in range(3)), key=lambda profile: profile.num_changes)


def test_one_step_stays_within_its_bounds(profile: StepProfile) -> None:
    frames = profile.forward_frames
    assert frames[0] == "trunk/service/client_calls.py:ClientCalls._forward", profile.table()
    assert len(frames) <= 8, profile.table()
    # These are ceilings, to be lowered, never raised.
    assert len(profile.calls) <= 25, profile.table()
    assert profile.num_changes <= 120, profile.table()


def test_page_names_the_files_of_a_step_and_no_other(profile: StepProfile) -> None:
    section = PAGE.read_text().partition("## Every file of a step")[2].partition("\n## ")[0]
    named = {word for word in section.split("`") if word.endswith(".py")}
    assert named == set(profile.calls), named ^ set(profile.calls)
