"""Every command of the documentation is run by CI or by a test, or says why not."""

import re
import shlex
from pathlib import Path

import pytest

from flower_split.cli.app_config import load_app_config
from flower_split.cli.main import main, make_parser
from tests.support.documentation import ROOT, Block, blocks

BASH = blocks("bash")
ELSEWHERE = "other machines: "


def names_in(text: str) -> set[tuple[str, str]]:
    """(page, block name) pairs that a script runs: ``block PAGE NAME``."""
    return set(re.findall(r"\bblock (\S+\.md) ([a-z-]+)", text))


def run_by_ci() -> set[tuple[str, str]]:
    return names_in((ROOT / ".ci" / "run").read_text())


def run_by_tests() -> set[tuple[str, str]]:
    return names_in((ROOT / "tests" / "processes" / "test_documentation.py").read_text())


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.place)
def test_bash_block_is_run_or_says_why_not(block: Block) -> None:
    if block.mark.startswith(ELSEWHERE):
        assert len(block.mark.removeprefix(ELSEWHERE)) > 10, "give a reason"
        return
    assert block.name, f"{block.place}: mark it <!-- block: NAME --> or <!-- {ELSEWHERE}WHY -->"
    page = str(block.page.relative_to(ROOT))
    same = {(page, block.name)} | {
        (str(other.page.relative_to(ROOT)), block.name)
        for other in BASH
        if other.name == block.name and other.text == block.text
    }
    assert same & (run_by_ci() | run_by_tests()), f"{block.place}: nothing runs it"


def test_what_ci_and_tests_run_is_there() -> None:
    there = {(str(block.page.relative_to(ROOT)), block.name) for block in BASH}
    wanted = run_by_ci() | run_by_tests()
    assert wanted, "CI runs no block: is its syntax still `block PAGE NAME`?"
    assert wanted <= there


def commands(block: Block) -> list[list[str]]:
    """The block's ``flower-split`` commands, as lists of arguments."""
    text = re.sub(r"<<'PYTHON'.*?^PYTHON$", "", block.text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\s#\s.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="\n;")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= {"\n", ";"}:
            found.append([])
        else:
            found[-1].append(word)
    return [words[1:] for words in found if words[:1] == ["flower-split"]]


@pytest.mark.parametrize(
    "block", [block for block in BASH if commands(block)], ids=lambda block: block.place
)
def test_flower_split_commands_have_arguments_and_keys_that_exist(
    block: Block, tmp_path: Path
) -> None:
    for words in commands(block):
        arguments = make_parser().parse_args(words)
        if arguments.command in ("run", "trunk"):
            app = ROOT / arguments.app
            if str(arguments.app) in ("job", "notes"):  # what docs/how-to/new-app.md makes
                app = tmp_path / arguments.app
                assert app.exists() or main(["new", str(app)]) == 0
            load_app_config(app, arguments.run_config)


def test_commands_finds_overrides_over_several_lines() -> None:
    text = "cd x  # note\nflower-split run APP --run-config '\n  a=\"b\"'; flower-split trunk \\\n  B\n"
    block = Block(Path("x.md"), 1, "bash", "", text)
    assert commands(block) == [["run", "APP", "--run-config", '\n  a="b"'], ["trunk", "B"]]
