"""Files, modules and names that the documentation mentions are there."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documentation import PAGES, ROOT, Block, blocks

PATH = re.compile(r"(?<![\w./-])(?:flower_split|tests|simulations|proto|docs|\.ci)/[\w./-]*\w/?")
DOTTED = re.compile(r"(?<![\w./-])flower_split(?:\.[A-Za-z_]\w*)+")
PYTHON = blocks("python")
RUN = [block for block in PYTHON if block.mark == "runs"]
RUN_BLOCKS = """
import json, os, tempfile, traceback
from pathlib import Path

root, outcomes = Path.cwd(), {}
for place, text in json.loads(Path("blocks.json").read_text()).items():
    os.chdir(tempfile.mkdtemp(dir=root))
    try:
        exec(compile(text, place, "exec"), {"__name__": "__main__"})
        outcomes[place] = "done"
    except Exception:
        outcomes[place] = traceback.format_exc()
(root / "outcomes.json").write_text(json.dumps(outcomes))
"""
GROUPS = re.compile(r"flower_split\.\w+")


def entry_point_groups() -> set[str]:
    """Names of entry-point groups, which look like modules: those a registry is made for."""
    found: set[str] = set()
    for file in (ROOT / "flower_split").rglob("*.py"):
        found |= set(re.findall(r'group="(flower_split\.\w+)"', file.read_text(encoding="utf-8")))
    return found


def resolve(dotted: str) -> None:
    """Import the longest module of a dotted name, and take its attributes."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if length == 1 or not str(error.name).startswith("flower_split"):
                raise
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return


def text_of(page: Path) -> str:
    """The page without what is said of former versions."""
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        text = re.sub(r"^\| `[\w.]+` \|", "|", text, flags=re.MULTILINE)
    return text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_dotted_names_of_a_page_exist(page: Path) -> None:
    text = text_of(page)
    missing = [path for path in PATH.findall(text) if not (ROOT / path.rstrip(".")).exists()]
    assert not missing, f"{page}: {missing}"
    groups = entry_point_groups()
    for dotted in sorted(set(DOTTED.findall(text)) - groups):
        if not dotted.startswith("flower_split.sh"):
            resolve(dotted)


def test_former_names_of_the_changelog_are_gone() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| `", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(rows) > 100
    kept = [row for row in rows if (ROOT / f"{row.replace('.', '/')}.py").exists()]
    assert not kept


def test_hand_over_table_names_functions_that_are_in_their_files() -> None:
    page = (ROOT / "docs" / "training-step.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d \| `([\w/.]+)` \| `(\w+)` \|", page, re.MULTILINE)
    assert len(rows) == 7
    for file, name in rows:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {
            node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert name in defined, f"{file} has no {name}"


def test_files_of_a_training_step_name_the_next_one() -> None:
    page = (ROOT / "docs" / "training-step.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| \d \| `([\w/.]+)`", page, re.MULTILINE)
    for file, following in zip(files, files[1:], strict=False):
        doc = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""
        assert following in doc.rpartition("Next:")[2], f"{file} must end with Next: {following}"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_block_parses_and_its_imports_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.startswith("trl"):
                pytest.importorskip("trl")
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.place}: {alias.name}"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By place, what each block ended with; one process runs them all, each in an empty folder."""
    root = tmp_path_factory.mktemp("blocks")
    (root / "blocks.json").write_text(json.dumps({b.place: b.text for b in RUN}))
    done = subprocess.run(
        [sys.executable, "-c", RUN_BLOCKS],
        cwd=root,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads((root / "outcomes.json").read_text())
    return found


@pytest.mark.parametrize("place", [block.place for block in RUN])
def test_python_block_marked_runs_does(place: str, outcomes: dict[str, str]) -> None:
    assert outcomes[place] == "done"
