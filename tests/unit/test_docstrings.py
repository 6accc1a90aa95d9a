"""Docstrings of functions say what to expect of a call: they begin with a verb in the imperative.

Ruff's D401 finds the nouns and verb forms that it knows; this finds the words that begin no imperative.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flower_split"
GENERATED = ("proto",)
NO_VERBS = frozenset(
    """
    a after an any as at before by each every everything for from how if in its nothing of on one
    some that the their this those to two what when where whether which while who whose why with
    without
    """.split()
)


def noun_clauses(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and first line of the docstrings of functions that begin with no verb.

    A property is named after what it is, as an attribute is.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        text = ast.get_docstring(node)
        if text and (text.startswith("`") or text.split()[0].lower().strip(".,:;") in NO_VERBS):
            yield node.lineno, text.splitlines()[0]


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        ("Return the rows.", False),
        ("What a row holds.", True),
        ("Whether there is one.", True),
        ("``rows`` as a table.", True),
        ("A row.", True),
    ],
)
def test_noun_clause_is_found(docstring: str, found: bool) -> None:
    assert bool(list(noun_clauses(f'def f():\n    """{docstring}"""'))) is found


def test_property_may_be_a_noun() -> None:
    source = 'class C:\n    @property\n    def f(self):\n        """The rows."""'
    assert not list(noun_clauses(source))


def test_functions_are_described_in_the_imperative() -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {text}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.relative_to(PACKAGE).as_posix().startswith(tuple(f"{n}/" for n in GENERATED))
        for line, text in noun_clauses(path.read_text())
    ]
    assert not found, "begin with a verb: Return, Check, Make …\n" + "\n".join(found)
