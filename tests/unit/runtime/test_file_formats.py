"""What a number of a file's format means for its reader."""

from pathlib import Path

import pytest

from flower_split.runtime.file_formats import FileFormat
from flower_split.runtime.version import __version__

READS_2_TO_3 = FileFormat(3, oldest=2)


@pytest.mark.parametrize("found", [2, 3])
def test_format_that_is_read_is_no_problem(found: int) -> None:
    assert READS_2_TO_3.problem(Path("f"), found) == ""


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (4, "f has format 4, and flower-split VERSION reads format 2 to 3: newer flower-split wrote it. "
            "Upgrade flower-split here."),
        (1, "f has format 1, and flower-split VERSION reads format 2 to 3: older flower-split wrote it. "
            "Go on with the version that wrote it, or begin a new run."),
        ("3", "f is damaged: its format should be a number. Restore the file."),
        (True, "f is damaged: its format should be a number. Restore the file."),
        (None, "f is damaged: its format should be a number. Restore the file."),
    ],
)  # fmt: skip
def test_format_that_is_not_read_is_named_with_the_remedy(found: object, words: str) -> None:
    assert READS_2_TO_3.problem(Path("f"), found) == words.replace("VERSION", __version__)
