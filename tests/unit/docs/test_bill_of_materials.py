"""``python .ci/sbom.py``: every distribution that flower-split needs, with version and licence."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.documentation import ROOT


def test_bill_names_every_runtime_dependency_with_version_and_licence() -> None:
    printed = subprocess.run(
        [sys.executable, ".ci/sbom.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    bill = json.loads(printed)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert bill["metadata"]["component"]["name"] == "flower-split"
    found = {item["name"]: item for item in bill["components"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        name = canonicalize_name(Requirement(line).name)
        item = found[name]
        assert item["version"] == metadata.version(name)
        assert item["purl"] == f"pkg:pypi/{name}@{item['version']}"
        (stated,) = item["licenses"]
        assert stated["license"]["name"] != "not stated", name
    assert {"numpy", "huggingface-hub"} <= found.keys()  # which others need
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in found)
    assert "pytest" not in found and "ruff" not in found
