"""Print the shell block of a Markdown file that follows the comment ``<!-- block: NAME -->``."""

import re
import sys
from pathlib import Path


def block(text: str, name: str) -> str:
    """Return the named block's lines."""
    found = re.search(
        rf"<!-- block: {re.escape(name)} -->\s*```(?:bash|sh)\n(.*?)```", text, re.DOTALL
    )
    if found is None:
        raise SystemExit(f"no shell block follows '<!-- block: {name} -->'")
    return found.group(1)


if __name__ == "__main__":
    print(block(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2]))
