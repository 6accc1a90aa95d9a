"""Print the modules that moved since a commit as a Markdown table: ``import_moves.py COMMIT``.

Renames are followed from commit to commit. A module whose last name is gone was split: the package
that its parts stayed in is given.
"""

import subprocess
import sys
from pathlib import Path


def moves(since: str) -> dict[str, str]:
    """Return old path -> path now (or the folder of its parts) of every moved module."""
    command = ["git", "log", "--reverse", "--name-status", "-M40%", "--format=", f"{since}..HEAD"]
    log = subprocess.run(
        [*command, "--", "flower_split"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, str] = {}
    for _, old, new in (line.split("\t") for line in log.splitlines() if line.startswith("R")):
        first = next((source for source, now in found.items() if now == old), old)
        found[first] = new
    return {old: _now(new) for old, new in sorted(found.items()) if old.endswith(".py")}


def _now(path: str) -> str:
    where = Path(path)
    while not where.exists():
        where = where.parent
    return str(where)


def _dotted(path: str) -> str:
    return f"`{path.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}`"


if __name__ == "__main__":
    print("| was | is |\n|---|---|")
    for old, new in moves(sys.argv[1]).items():
        if old != new:
            print(f"| {_dotted(old)} | {_dotted(new)} |")
