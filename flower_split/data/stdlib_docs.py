"""The quick-start's data: documentation of different areas of the installed standard library.

Every client owns the docstrings of one area (networking, data types, tools, the system ...), read
with :mod:`ast` from the source files of the Python that runs: real text, not identically
distributed, offline, and nothing is imported or executed.
"""

import ast
import inspect
import os
import sysconfig
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_split.errors import DataError

MIN_WORDS = 12
"""Shorter docstrings ("Return the name.") say nothing about an area."""

NOT_LIBRARY = ("test", "tests", "idlelib", "turtledemo", "encodings", "pydoc_data")
"""Folders of the standard library whose source is tests, demos or tables."""

AREAS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "networking",
        (
            "asyncio email ftplib http imaplib ipaddress mailbox mimetypes nntplib poplib",
            "selectors smtplib socket socketserver ssl telnetlib urllib uuid webbrowser wsgiref",
            "xmlrpc cgi html xml",
        ),
    ),
    (
        "data types",
        (
            "_pydecimal bisect calendar collections copy csv datetime difflib enum fractions",
            "functools graphlib heapq json numbers operator random re reprlib statistics string",
            "textwrap types typing weakref zoneinfo _collections_abc tomllib dataclasses colorsys",
        ),
    ),
    (
        "tools",
        (
            "argparse ast bdb cmd code codeop configparser dis doctest gettext getopt",
            "importlib inspect modulefinder optparse pdb pickletools pkgutil pprint",
            "profile pstats pyclbr pydoc timeit tkinter tokenize trace traceback turtle",
            "unittest warnings",
        ),
    ),
    (
        "system",
        (
            "_pyio bz2 codecs concurrent contextlib ctypes curses fileinput fnmatch genericpath",
            "getpass glob gzip io linecache locale logging lzma multiprocessing ntpath os pathlib",
            "pickle platform plistlib posixpath queue sched shelve shlex shutil signal site",
            "sqlite3 subprocess sysconfig tarfile tempfile threading tracemalloc venv zipapp",
            "zipfile zipimport",
        ),
    ),
)
"""Name and top-level modules of each area; a module the running Python lacks is passed over."""


def library_files(root: Path | None = None) -> list[Path]:
    """Return the source files of the standard library, sorted, without tests, demos and code tables.

    Args:
        root: The library's directory; by default that of the running Python.

    Raises:
        DataError: The directory holds no source files (a stripped or zipped installation).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _is_library(name)]  # site-packages is large
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files = sorted(path for path in files if _is_library(path.name))
    if not files:
        raise DataError(
            f"the standard library's source must be installed; {root} holds no .py file. "
            "Use another Python, or another data.source (text, jsonl, hub)."
        )
    return files


def _is_library(name: str) -> bool:
    return name not in NOT_LIBRARY and not name.endswith("-packages")


@dataclass(frozen=True, slots=True)
class Area:
    """Part of the library's documentation: what one client owns."""

    name: str
    docstrings: tuple[str, ...]  # in order of module, file and line

    @property
    def size(self) -> int:
        """Characters."""
        return sum(map(len, self.docstrings))


def area_docstrings(partition_id: int, num_partitions: int, root: Path | None = None) -> Area:
    """Return the documentation that client ``partition_id`` of ``num_partitions`` owns.

    Four clients own one of :data:`AREAS` each. For fewer, the smallest neighbouring areas are
    joined; for more, the largest one is halved until there are enough. The order is that of the
    source; the same Python gives the same areas.

    Args:
        partition_id: From 0.
        num_partitions: At least 1.
        root: The library's directory; by default that of the running Python.

    Raises:
        DataError: The library's source is not there, or cannot feed so many clients.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = library_files(root)
    if num_partitions == len(AREAS):
        return _read_area(*AREAS[partition_id], root, files)
    areas = [_read_area(name, lists, root, files) for name, lists in AREAS]
    while len(areas) > num_partitions:
        first = min(range(len(areas) - 1), key=lambda i: areas[i].size + areas[i + 1].size)
        areas[first : first + 2] = [_joined(areas[first], areas[first + 1])]
    while len(areas) < num_partitions:
        largest = max(range(len(areas)), key=lambda i: (areas[i].size, -i))
        if len(areas[largest].docstrings) < 4:
            raise DataError(
                f"the standard library's documentation is not enough for {num_partitions} clients. "
                f"Use at most {len(areas)}, or another data.source (text, jsonl, hub)."
            )
        areas[largest : largest + 1] = _halves(areas[largest])
    return areas[partition_id]


def _joined(first: Area, second: Area) -> Area:
    return Area(f"{first.name}, {second.name}", first.docstrings + second.docstrings)


def _halves(area: Area) -> list[Area]:
    """Return two areas of about the same number of characters."""
    seen, cut = 0, 0
    while seen < area.size / 2:
        seen += len(area.docstrings[cut])
        cut += 1
    cut = min(max(cut, 2), len(area.docstrings) - 2)
    return [
        Area(f"{area.name} {number}", part)
        for number, part in enumerate((area.docstrings[:cut], area.docstrings[cut:]), start=1)
    ]


def _read_area(name: str, lists: Sequence[str], root: Path, files: Sequence[Path]) -> Area:
    """Return the docstrings of an area's modules; a docstring that comes again is left out."""
    modules = {module for line in lists for module in line.split()}
    found: dict[str, None] = {}
    for path in files:
        if path.relative_to(root).parts[0].removesuffix(".py") in modules:
            found.update(dict.fromkeys(_docstrings(path)))
    return Area(name, tuple(found))


def _docstrings(path: Path) -> Iterator[str]:
    """Yield a file's docstrings of module, classes and functions; none if it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    blocks = (ast.stmt, ast.excepthandler, ast.match_case)
    todo: deque[ast.AST] = deque([tree])  # breadth first, as ast.walk, but not into expressions
    while todo:
        node = todo.popleft()
        todo.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, blocks))
        if isinstance(node, documented) and node.body:
            text = ast.get_docstring(node, clean=False)
            if text is not None and len(text.split()) >= MIN_WORDS:
                yield inspect.cleandoc(text)
