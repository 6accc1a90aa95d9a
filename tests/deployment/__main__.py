"""Print the table of faults as Markdown.

Usage: ``python -m tests.deployment [trunk] [federation]``.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.deployment.faults import Seen, trunk_faults
from tests.deployment.federation_faults import federation_faults


def table(rows: Sequence[Seen]) -> str:
    """Return rows as a Markdown table."""
    lines = [
        "| what happened | what the operator sees | after | the run | hashes as undisturbed |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        after = f"{row.after:.0f} s" if row.after else ""
        same = {True: "yes", False: "**no**", None: ""}[row.same]
        lines.append(f"| {row.fault} | {row.seen} | {after} | {row.then} | {same} |")
    return "\n".join(lines)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parts = {"trunk": trunk_faults, "federation": federation_faults}
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as folder:
            print(table(parts[name](Path(folder), _tell)), flush=True)
