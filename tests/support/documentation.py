"""The documentation's fenced blocks, with the comment that stands above each."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "simulations").rglob("README.md"),
    ]
)
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str  # as behind the fence; "" without one
    mark: str  # the comment above, such as "block: tests"; "" without one
    text: str

    @property
    def name(self) -> str | None:
        """The name that CI and tests run the block by."""
        return self.mark.removeprefix("block: ") if self.mark.startswith("block: ") else None

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str, pages: list[Path] = PAGES) -> list[Block]:
    """Return all blocks of a language."""
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append(Block(page, line, language, match["mark"] or "", match["text"]))
    return found


def in_site(page: Path) -> bool:
    """Whether a page belongs to the site."""
    return page.is_relative_to(ROOT / "docs")
