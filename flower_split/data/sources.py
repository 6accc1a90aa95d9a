"""Where records come from: text files, JSON lines, and data sets that ``datasets`` can load."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from flower_split.config import DataConfig
from flower_split.data.documents import Record
from flower_split.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".arrow": "arrow",
}


def read_text(path: Path) -> list[Record]:
    """Text documents: each file of a directory, or the paragraphs of a single file.

    Paragraphs are what blank lines separate. Records have the fields ``text``, ``file`` (relative
    to ``path``) and ``folder`` (the first folder below ``path``), for partitioners to divide by.

    Raises:
        DataError: The path is not there, holds no text file, or a file is not UTF-8.
    """
    files = _files(path, TEXT_SUFFIXES)
    if path.is_dir() and len(files) > 1:
        return [
            Record(
                str(file),
                {
                    "text": _read(file),
                    "file": str(file.relative_to(path)),
                    "folder": file.relative_to(path).parts[0],
                },
            )
            for file in files
        ]
    [file] = files
    return [
        Record(f"{file}, paragraph {number}", {"text": "\n".join(lines)})
        for number, lines in enumerate(_paragraphs(_read(file)), start=1)
    ]


def _paragraphs(text: str) -> Iterator[list[str]]:
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield lines
            lines = []


def read_jsonl(path: Path) -> list[Record]:
    """The records of a JSON-lines file, or of every such file of a directory; blank lines are out.

    Raises:
        DataError: The path is not there, or a line is no JSON object; names file and line.
    """
    records = []
    for file in _files(path, JSONL_SUFFIXES):
        for number, line in enumerate(_read(file).split("\n"), start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                content = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{place}: every line must be one JSON object; this one does not parse: "
                    f"{error}. Correct or remove the line."
                ) from error
            if not isinstance(content, dict):
                raise DataError(
                    f"{place}: every line must be one JSON object; this one is a "
                    f"{type(content).__name__}. Correct or remove the line."
                )
            records.append(Record(place, content))
    return records


def _files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """``path`` itself if it is a file, else its files with one of ``suffixes``, sorted."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(
            f"data.path must be a file or directory; {path} is not there. Give an absolute path: "
            "a relative one starts where the client's process runs."
        )
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    if not files:
        raise DataError(
            f"data.path is the directory {path}, which holds no file ending in "
            f"{', '.join(suffixes)}. Give the file itself, or rename its files."
        )
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: text must be UTF-8; byte {error.start} is not. Convert the file."
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error


class HubRecords(Sequence[Record]):
    """The rows of a ``datasets.Dataset``, read when asked for."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset = dataset
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """A row as a record; its place is the row's number in the data set."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Record(f"{self._name}, row {index}", self._dataset[index])

    def column(self, name: str) -> list[object]:
        """All values of a column, without reading the others.

        Raises:
            DataError: There is no such column; names those there are.
        """
        if name not in self._dataset.column_names:
            raise missing_column(name, self._dataset.column_names)
        return list(self._dataset[name])


def column_of(records: Sequence[Record], name: str) -> list[object]:
    """One field of every record.

    Raises:
        DataError: A record lacks the field.
    """
    if isinstance(records, HubRecords):
        return records.column(name)
    for record in records:
        if name not in record.content:
            raise missing_column(name, record.content, record.place)
    return [record.content[name] for record in records]


def missing_column(name: str, known: object, place: str = "the data set") -> DataError:
    """The error for a ``data.partition-by`` that is not there."""
    fields = ", ".join(sorted(map(str, known))) if isinstance(known, Sequence | dict) else "none"
    return DataError(
        f"data.partition-by must name a field of every record; {place} has no {name!r}, its "
        f"fields are {fields}."
    )


def read_hub(config: DataConfig) -> HubRecords:
    """The split ``data.split`` of ``data.dataset``: a hub id, or a local directory or file.

    Raises:
        DataError: It cannot be loaded, or has no such split.
    """
    import datasets  # heavy, and only needed here

    name, path = config.dataset, Path(config.dataset)
    subset = config.subset or None
    try:
        if path.is_file():
            builder = _BUILDERS.get(path.suffix.lower())
            if builder is None:
                raise DataError(
                    f"data.dataset is the file {path}; its name must end in one of "
                    f"{', '.join(_BUILDERS)}."
                )
            loaded = datasets.load_dataset(builder, data_files=str(path), split=config.split)
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved = datasets.load_from_disk(str(path))
            loaded = saved[config.split] if isinstance(saved, dict) else saved
        else:
            loaded = datasets.load_dataset(name, subset, split=config.split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.dataset {name!r}, subset {config.subset!r}, split {config.split!r} cannot be "
            f"loaded: {error} Check the three keys and the connection, or give a local path."
        ) from error
    return HubRecords(loaded, name)
