"""The import contracts refuse what they must: seen on a copy of the package with one more module."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import flower_split

ROOT = Path(flower_split.__file__).parents[1]


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def test_a_new_top_level_module_fails_until_it_has_a_layer(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    skipped = shutil.ignore_patterns("__pycache__", "*.safetensors", "quickstart")
    shutil.copytree(ROOT / "flower_split", tmp_path / "flower_split", ignore=skipped)
    clean = lint(tmp_path)
    assert clean.returncode == 0, clean.stdout + clean.stderr
    (tmp_path / "flower_split" / "stray.py").write_text('"""A module without a place."""\n')
    stray = lint(tmp_path)
    assert stray.returncode != 0
    assert "stray" in stray.stdout + stray.stderr
