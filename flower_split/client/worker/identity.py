"""What a worker is good for: one run of one app, on one node, with the code that it has loaded.

One that waits for its node's first message becomes the worker of that message's run.

A worker that differs from its caller in any of this gives no answer; it ends, and a new one is started.
So nothing in it is ever older than what a fresh process would load.
"""

import hashlib
import json
import os
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from flwr.app import Context
from flwr.clientapp import ClientApp

from flower_split.errors import WorkerError
from flower_split.runtime.version import __version__

HANDLERS = "flower_split.client.handlers"
"""Loads torch and transformers, and what else a message takes."""

NODE_VARIABLE = "FLOWER_SPLIT_NODE_PROCESS"
"""Process id of the SuperNode, where a launcher and Flower itself both start its ClientApps."""

_START = 19  # of the fields after the command in /proc/PID/stat: the start time


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerIdentity:
    """What a worker was started for."""

    code: str  # version and files of this package, and when distributions were installed
    app: str  # module:attribute of the ClientApp; of one that waits, the module that it loads meanwhile
    folder: str  # the app's directory, with Flower's hash of it in its name
    app_files: str  # of that directory
    run: int  # Flower's run id; 0: it waits for the first one
    node_process: str  # process@start of what starts the node's ClientApps
    interpreter: str
    import_path: tuple[str, ...]  # sys.path

    @classmethod
    def here(cls, app: ClientApp, context: Context) -> Self:
        """Return the identity that a worker must have to answer for this process.

        Args:
            app: The app that Flower has loaded into this process.
            context: The message's context.

        Raises:
            WorkerError: It cannot be told which app it is, or who started this process.
        """
        name, folder = find_app(app, sys.path)
        return cls(
            code=code_mark(),
            app=name,
            folder=str(folder),
            app_files=_digest(folder.rglob("*")),
            run=context.run_id,
            node_process=process_mark(int(os.environ.get(NODE_VARIABLE) or os.getppid())),
            interpreter=sys.executable,
            import_path=tuple(path for path in sys.path if path),
        )

    @classmethod
    def waiting(cls) -> Self:
        """Return the identity of a worker that waits for the first message, of whatever app and run."""
        return cls(
            code=code_mark(),
            app=HANDLERS,
            folder="",
            app_files="",
            run=0,
            node_process="",
            interpreter=sys.executable,
            import_path=tuple(path for path in sys.path if path),
        )

    def may_become(self, other: "WorkerIdentity") -> bool:
        """Return whether a worker may take this one's place from now on: it waits, with the same code."""
        return not self.run and (self.code, self.interpreter) == (other.code, other.interpreter)

    @classmethod
    def read(cls, text: str) -> Self:
        """Return the inverse of :meth:`write`.

        Raises:
            ValueError: It is of a version with other fields.
        """
        values = json.loads(text)
        names = {item.name for item in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"a worker's identity has the fields {sorted(names)}")
        return cls(**{**values, "import_path": tuple(values["import_path"])})

    def write(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    def differs(self, other: "WorkerIdentity") -> tuple[str, ...]:
        """Return the names of the fields in which another one differs."""
        theirs = asdict(other)
        return tuple(name for name, value in asdict(self).items() if theirs[name] != value)


def find_app(app: ClientApp, path: Sequence[str]) -> tuple[str, Path]:
    """Return the reference and the directory of a ClientApp that Flower has loaded.

    Flower puts the app's directory on the import path; its pyproject.toml names the object.

    Raises:
        WorkerError: No directory there names it.
    """
    for folder in filter(None, path):
        file = Path(folder, "pyproject.toml")
        if not file.is_file():
            continue
        try:
            project = tomllib.loads(file.read_text(encoding="utf-8"))
            name = str(project["tool"]["flwr"]["app"]["components"]["clientapp"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another project's, whose directory is on the path
        module, _, attributes = name.partition(":")
        found: object = sys.modules.get(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute, None)
        if found is app:
            return name, Path(folder)
    raise WorkerError(
        "no pyproject.toml on the import path names this object as its clientapp. Have it name what "
        'make_client_app returned, or set train.client-worker = "off".'
    )


def process_mark(pid: int) -> str:
    """Return what tells a process from every other, also from a later one with the same id.

    Raises:
        WorkerError: There is no such process, as seen from here.
    """
    try:
        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        raise WorkerError(
            f"process {pid}, which starts this node's ClientApps, cannot be looked at: {error.strerror}."
        ) from error
    return f"{pid}@{after[_START]}"


def code_mark() -> str:
    """Return a mark of the code that a process started now would load."""
    package = Path(__file__).parents[2]
    installed = (Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages"))
    return f"{__version__} {_digest([*package.rglob('*.py'), *installed])}"


def _digest(files: Iterable[Path]) -> str:
    """Return a digest of files' names, sizes and times; of a directory it is the time alone."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(files):
        if "__pycache__" in path.parts:
            continue
        try:
            found = path.stat()
        except OSError:
            continue  # removed meanwhile, or a dead link
        if not path.is_dir() or path.name in ("site-packages", "dist-packages"):
            digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()
