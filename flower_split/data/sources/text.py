"""Plain text files: a document for each file of a directory, or each paragraph of one file."""

from collections.abc import Iterator

from flower_split.data.documents import Record
from flower_split.data.source import FileSource, SourceRecords, SourceRequest, read_utf8


class TextSource(FileSource):
    """Text files below ``data.path``."""

    suffixes = (".txt", ".md", ".rst", ".text")

    def read(self, request: SourceRequest) -> SourceRecords:
        """Return a record for each file of a directory, or each paragraph of a single file.

        Paragraphs are what blank lines separate. Records have the fields ``text``, ``file``
        (relative to the path) and ``folder`` (the first folder below it), to divide by.

        Raises:
            DataError: The path is not there, holds no text file, or a file is not UTF-8.
        """
        path = request.path
        files = self.files(path)
        if path.is_dir() and len(files) > 1:
            records = [
                Record(
                    str(file),
                    {
                        "text": read_utf8(file),
                        "file": str(file.relative_to(path)),
                        "folder": file.relative_to(path).parts[0],
                    },
                )
                for file in files
            ]
        else:
            [file] = files
            records = [
                Record(f"{file}, paragraph {number}", {"text": "\n".join(lines)})
                for number, lines in enumerate(_paragraphs(read_utf8(file)), start=1)
            ]
        made = self.result(request, records)
        return SourceRecords(records=records, where=made.where, own=made.own, text_field="text")


def _paragraphs(text: str) -> Iterator[list[str]]:
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield lines
            lines = []
