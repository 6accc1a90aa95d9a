"""The site's configuration, the printed pages, the README's size, and the files around the code."""

import ast
import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from flower_split.aggregation import METHODS
from flower_split.config import run_config_keys
from flower_split.runs.metrics import SCHEMA
from tests.support.documentation import PAGES, ROOT, in_site

PRINTED = {
    "reference/combinations.md",
    "reference/command.md",
    "reference/configuration.md",
    "reference/metrics.md",
    "reference/protocol.md",
}


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_page_has_every_key_once_with_default_and_meaning(hooks: ModuleType) -> None:
    rows = re.findall(
        r"^\| `([\w.-]+)` \| (\w+) \| (.+?) \| (.*) \|$",
        hooks.configuration_page(),
        re.MULTILINE,
    )
    assert [row[0] for row in rows] == list(dict.fromkeys(row[0] for row in rows))
    assert {row[0] for row in rows} == set(run_config_keys())


def test_combinations_page_has_condition_reason_and_remedy_of_each(hooks: ModuleType) -> None:
    rows = re.findall(
        r"^\| (?!settings|-)(.+) \| (.+) \| (.+) \|$", hooks.combinations_page(), re.M
    )
    assert len(rows) >= 10
    assert all(all(cell.strip() for cell in row) for row in rows)


def test_command_page_has_every_option(hooks: ModuleType) -> None:
    page = hooks.command_page()
    calls = [
        node
        for file in sorted((ROOT / "flower_split" / "cli").glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
    ]
    names = {arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)}
    assert len(names) > 20
    assert all(f"`{name}" in page for name in names)


def test_aggregation_page_has_every_method_and_its_paper(hooks: ModuleType) -> None:
    page = (ROOT / "docs" / "aggregation.md").read_text(encoding="utf-8")
    summary = page.partition("\n\n`flora` and `fedex-lora`")[0]
    said = re.findall(r"^\| `([\w-]+)`", summary.partition("|---")[2], re.MULTILINE)
    assert sorted(said) == sorted(METHODS)
    assert page.count("<!-- printed: aggregators -->") == 1
    printed = hooks.on_page_markdown(page, None, None, None)
    assert "2305.05644" in printed and "<!-- printed" not in printed


def test_metrics_page_has_every_field_of_every_kind(hooks: ModuleType) -> None:
    sections = hooks.metrics_page().split("\n## ")[1:]
    assert [part.partition("\n")[0].strip("`") for part in sections] == ["On every line", *SCHEMA]
    for part, kind in zip(sections[1:], SCHEMA.values(), strict=True):
        assert re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) == list(kind.fields)


@pytest.mark.parametrize(
    ("page", "name", "words"),
    [
        ("how-to/follow.md", "exit-codes", ["| 0 | done", "| 5 | the run goes on"]),
        ("how-to/resume.md", "resume-keys", ["| `num-server-rounds` |", "| `trunk.address` |"]),
    ],
)
def test_tables_stand_where_a_page_asks_for_them(
    hooks: ModuleType, page: str, name: str, words: list[str]
) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert f"<!-- printed: {name} -->" in text
    shown = hooks.on_page_markdown(text, None, None, None)
    assert "<!-- printed" not in shown and all(word in shown for word in words)


def test_roles_of_docstrings_become_names(hooks: ModuleType) -> None:
    html = "see :class:<code>~flower_split.errors.TrunkRefused</code> and :meth:<code>close</code>"
    shown = hooks.on_page_content(html, None, None, None)
    assert shown == "see <code>TrunkRefused</code> and <code>close</code>"


def test_protocol_page_has_every_method_and_message(hooks: ModuleType) -> None:
    page = hooks.protocol_page(hooks.PROTO.read_text(encoding="utf-8"))
    proto = hooks.PROTO.read_text(encoding="utf-8")
    for name in re.findall(r"^\s*(?:rpc|message|enum) (\w+)", proto, re.MULTILINE):
        assert f"`{name}`" in page or f" {name} {{" in page, name


def test_navigation_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE))
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES if in_site(page)}
    assert named == written | PRINTED


def test_site_fetches_no_font_script_or_style() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False
    assert "extra_javascript" not in settings
    assert not any(path.startswith("http") for path in settings["extra_css"])


def test_readme_is_short_and_begins_with_both_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    first_screen = "\n".join(lines[:30])
    assert "<!-- block: quick-start -->" in first_screen and "<!-- block: tests -->" in first_screen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / target).resolve()
        printed = {ROOT / "docs" / name for name in PRINTED}
        assert file in printed or file.exists(), f"{page}: {target}"


def test_workflows_are_yaml_with_jobs_that_have_steps() -> None:
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert files
    for file in files:
        workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert True in workflow or "on" in workflow  # YAML 1.1 reads the key `on` as true
        for name, job in workflow["jobs"].items():
            assert job["runs-on"] and job["steps"], name
            assert all(("run" in step) != ("uses" in step) for step in job["steps"]), name
            assert job["timeout-minutes"] <= 180, name


def test_workflow_covers_the_supported_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    said = {
        line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)
    }
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    matrix = yaml.safe_load(text)["jobs"]["tests"]["strategy"]["matrix"]
    assert set(matrix["python"]) == said == {"3.11", "3.12", "3.13"}


def test_citation_is_valid_cff() -> None:
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cff.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cff["version"], cff["license"]) == (project["version"], project["license"])
