"""``requirements.lock``: the versions of ``constraints.txt``, each with the hashes of its files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.documentation import ROOT

HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def pins(path: Path) -> dict[str, tuple[str, str, list[str]]]:
    """Name -> version, marker, hashes; every line must be one of these."""
    found = {}
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        named, *hashes = re.split(r"\s+(?=--)", line.strip())
        requirement = Requirement(named)
        (pin,) = requirement.specifier
        assert pin.operator == "==" and not requirement.url and not requirement.extras, line
        assert all(HASH.fullmatch(item) for item in hashes), line
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is there twice"
        found[name] = pin.version, str(requirement.marker or ""), hashes
    return found


@pytest.fixture(scope="module")
def locked() -> dict[str, tuple[str, str, list[str]]]:
    return pins(ROOT / "requirements.lock")


def test_lock_has_the_versions_of_the_constraints_and_no_others(
    locked: dict[str, tuple[str, str, list[str]]],
) -> None:
    constraints = pins(ROOT / "constraints.txt")
    assert {name: pin[:2] for name, pin in locked.items()} == {
        name: pin[:2] for name, pin in constraints.items()
    }


def test_every_pin_of_the_lock_has_a_hash(
    locked: dict[str, tuple[str, str, list[str]]],
) -> None:
    assert [name for name, (*_, hashes) in locked.items() if not hashes] == []


def test_torch_is_the_release_and_no_build_of_one_machine(
    locked: dict[str, tuple[str, str, list[str]]],
) -> None:
    assert locked["torch"][:2] == ("2.13.0", "")


def test_lock_has_everything_that_the_package_needs_here(
    locked: dict[str, tuple[str, str, list[str]]],
) -> None:
    """With --require-hashes pip refuses what a line does not name."""
    printed = subprocess.run(
        [sys.executable, ".ci/sbom.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    needed = {item["name"] for item in json.loads(printed)["components"]}
    assert needed - set(locked) == set()
