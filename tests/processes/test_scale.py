"""Rounds on paper beside real ones: the trunk's own engine, and up to 64 clients that are elsewhere."""

from pathlib import Path

import pytest

from tests.support.scale_rig import compare


@pytest.mark.slow  # minutes, and it wants an idle machine; tests/unit/scale has sums by hand
def test_predicted_rounds_are_within_20_percent_of_real_ones(tmp_path: Path) -> None:
    found = compare([2, 4, 8, 16, 32, 64], tmp_path)
    off = {count: said / real - 1 for count, (said, real) in found.items()}
    assert all(abs(error) <= 0.2 for error in off.values()), off
