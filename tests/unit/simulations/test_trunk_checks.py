"""``simulations/trunk_checks.py``: what it calls checks is there, and its arithmetic."""

import importlib.util
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from flower_split.trunk.compute import compute
from flower_split.trunk.service.audit_log import AuditLog
from tests.support.documentation import ROOT


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(
        "trunk_checks", ROOT / "simulations" / "trunk_checks.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trunk_checks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["trunk_checks"]


def test_steps_of_all_variants_are_measured_and_the_checks_put_back(
    script: ModuleType, tmp_path: Path
) -> None:
    before = compute.check_finite
    config = script.write_model(tmp_path, hidden=64, layers=1)
    with AuditLog(tmp_path / "audit.jsonl") as audit:
        measured = script.measure(config, audit, (1, 8, 64), 1)
    assert {name: len(found) for name, found in measured.steps.items()} == {
        script.WITHOUT: 1,
        script.WITH: 1,
        script.AUDITED: 1,
    }
    # Every check has been called in the one step that is counted, and none was left out of the table.
    assert set(measured.inside.seconds) == {name for _, _, name, _ in script.CHECKS}
    assert 0 < measured.inside.seconds["quotas"][0] < measured.steps[script.WITH][0][0]
    assert all(0 < share < 1 for share in script.share_inside(measured))
    assert compute.check_finite is before


def test_interval_of_twenty_values_is_from_the_sixth_to_the_fifteenth(script: ModuleType) -> None:
    """Conover 1999, table A3: P(X <= 5) of 20 halves is 0.0207, P(X <= 6) is 0.0577."""
    assert script.interval(range(20, 0, -1)) == (10.5, 6, 15)


def test_interval_of_six_values_is_all_of_them_and_of_five_there_is_none(
    script: ModuleType,
) -> None:
    assert script.interval([1, 2, 3, 4, 5, 6]) == (3.5, 1, 6)
    assert script.interval([1, 2, 3, 4, 5]) == (3, -math.inf, math.inf)


def test_check_that_calls_another_one_is_counted_once(script: ModuleType) -> None:
    inside = script.Inside()
    inner = inside.timed("inner", lambda: time.perf_counter())
    outer = inside.timed("outer", lambda: inner())
    outer()
    assert set(inside.seconds) == {"outer"} and inside.calls == 1
    inner()
    assert set(inside.seconds) == {"outer", "inner"} and inside.calls == 2
