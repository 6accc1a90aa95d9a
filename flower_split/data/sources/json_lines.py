"""JSON: one object on each line, or, in a file that ends in .json, an array of objects."""

import json
from collections.abc import Iterator
from pathlib import Path

from flower_split.data.documents import Record
from flower_split.data.source import FileSource, SourceRecords, SourceRequest, read_utf8
from flower_split.data.tally import Tally
from flower_split.errors import DataError


class JsonLinesSource(FileSource):
    """JSON files below ``data.path``."""

    suffixes = (".jsonl", ".ndjson", ".json")

    def read(self, request: SourceRequest) -> SourceRecords:
        """Return the objects of all files, in order; blank lines are passed over.

        Raises:
            DataError: The path is not there, or an object does not parse; names file and line.
        """
        records = []
        for file in self.files(request.path):
            text = read_utf8(file)
            if file.suffix.lower() == ".json" and text.lstrip().startswith("["):
                records += list(_array(file, text, request.tally))
            else:
                records += list(_lines(file, text, request.tally))
        return self.result(request, records)


def _lines(file: Path, text: str, tally: Tally) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            yield Record(place, _object(parse_json(line), place), str(file.parent))
        except (ValueError, RecursionError) as error:
            tally.bad(
                DataError(
                    f"{place}: every line must be one JSON object; this one does not parse: "
                    f"{error}. Correct or remove the line."
                )
            )
        except DataError as error:
            tally.bad(error)


def _array(file: Path, text: str, tally: Tally) -> Iterator[Record]:
    try:
        items = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: the JSON array does not parse: {error}. Correct it.") from error
    assert isinstance(items, list)
    for number, item in enumerate(items, start=1):
        place = f"{file}, record {number}"
        try:
            yield Record(place, _object(item, place), str(file.parent))
        except DataError as error:
            tally.bad(error)


def parse_json(text: str) -> object:
    """Return what JSON ``text`` holds.

    Raises:
        ValueError: It does not parse, or an object has the same name twice, of which a parser would
            keep one in silence.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"an object holds {', '.join(map(repr, twice))} twice")
    return made


def _object(content: object, place: str) -> dict[str, object]:
    if not isinstance(content, dict):
        raise DataError(
            f"{place}: every line must be one JSON object; this one is a "
            f"{type(content).__name__}. Correct or remove the line."
        )
    return content
