"""How far one optimizer step travels through the package, counted on a real step over loopback."""

from tests.support.step_profile import profile_step


def test_one_step_stays_within_its_bounds() -> None:
    profile = profile_step()
    frames = profile.forward_frames
    assert frames[0] == "trunk/service/client_calls.py:ClientCalls._forward", profile.table()
    assert len(frames) <= 8, profile.table()
    # Goals: 25 files and 120 changes. These are ceilings, to be lowered, never raised.
    assert len(profile.calls) <= 30, profile.table()
    assert profile.num_changes <= 143, profile.table()
