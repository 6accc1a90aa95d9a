"""The shape of the house: sizes, places and imports that keep the code readable, as tests."""

import ast
from collections.abc import Iterator
from pathlib import Path

import flower_split

PACKAGE = Path(flower_split.__file__).parent
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
GENERATED = ("trunk_pb2.py",)
TABLES = ("config/combinations.py",)  # one row after the other, read where one is looked for


def sources() -> list[Path]:
    """Every source file of the package but generated ones."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in GENERATED]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_files_are_short_enough_to_read_at_once() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in sources()}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert {name for name in long if name not in TABLES} == set()


def test_functions_are_short_enough_to_read_at_once() -> None:
    long = {}
    for path in sources():
        for function in functions(ast.parse(path.read_text())):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                long[f"{name_of(path)}:{function.name}"] = lines
    assert long == {}


def test_root_holds_errors_and_packages_and_no_other_module() -> None:
    modules = {path.name for path in PACKAGE.glob("*.py")}
    assert modules == {"__init__.py", "errors.py"}
    for folder in sorted(path for path in PACKAGE.iterdir() if path.is_dir()):
        if folder.name != "__pycache__":
            assert (folder / "__init__.py").is_file(), f"{folder.name} is no package"


def test_every_package_says_what_it_is_and_where_to_begin() -> None:
    silent = []
    for path in sources():
        if path.name == "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            if len(docstring.splitlines()) < 3:
                silent.append(name_of(path))
    assert silent == []


def test_imports_are_never_exempted_from_the_walls() -> None:
    exempted = [name_of(path) for path in sources() if "TID251" in path.read_text()]
    assert exempted == []
