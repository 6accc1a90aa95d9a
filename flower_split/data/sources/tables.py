"""Tables: CSV and parquet files, data sets that ``datasets`` saved to disk, and those of the hub."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from flower_split.config import DataConfig
from flower_split.data.documents import Record
from flower_split.data.source import (
    DataSource,
    FileSource,
    SourceRecords,
    SourceRequest,
    read_utf8,
)
from flower_split.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".arrow": "arrow",
}


class TableRecords(Sequence[Record]):
    """The rows of a ``datasets.Dataset``, read when asked for."""

    def __init__(self, dataset: "Dataset", name: str) -> None:
        self._dataset = _undecoded(dataset)
        self._name = name
        path = Path(name)
        self._folder = str(path if path.is_dir() else path.parent)

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Return a row as a record; its place is the row's number in the data set, from 0.

        Raises:
            DataError: The row cannot be decoded.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = f"{self._name}, row {index}"
        try:
            return Record(place, self._dataset[index], self._folder)
        except (ValueError, OSError, OverflowError) as error:  # Arrow's errors are among these
            raise DataError(
                f"{place} cannot be decoded: {error} Correct or remove the record."
            ) from error

    def column(self, name: str) -> list[object]:
        """Return all values of a column, without reading the others.

        Raises:
            DataError: There is no such column; names those there are.
        """
        if name not in self._dataset.column_names:
            raise missing_column(name, self._dataset.column_names)
        return list(self._dataset[name])


def column_of(records: Sequence[Record], name: str) -> list[object]:
    """Return one field of every record.

    Raises:
        DataError: A record lacks the field.
    """
    if isinstance(records, TableRecords):
        return records.column(name)
    for record in records:
        if name not in record.content:
            raise missing_column(name, record.content, record.place)
    return [record.content[name] for record in records]


def missing_column(name: str, known: object, place: str = "the data set") -> DataError:
    """Return the error for a ``data.partition-by`` that is not there."""
    fields = ", ".join(sorted(map(str, known))) if isinstance(known, Sequence | dict) else "none"
    return DataError(
        f"data.partition-by must name a field of every record; {place} has no {name!r}, its "
        f"fields are {fields}."
    )


class CsvSource(FileSource):
    """CSV files with a header; every value is text, and an empty cell is an absent field."""

    suffixes = (".csv", ".tsv")

    def read(self, request: SourceRequest) -> SourceRecords:
        """Return the rows of all files, in order.

        Raises:
            DataError: There is no file or header, or a row has another number of cells; names file
                and line.
        """
        records: list[Record] = []
        for file in self.files(request.path):
            text = io.StringIO(read_utf8(file), newline="")
            tabs = file.suffix.lower() == ".tsv"
            rows = csv.reader(text, strict=True, delimiter="\t" if tabs else ",")
            try:
                header = next(rows, [])
                if not header or len(set(header)) < len(header):
                    raise DataError(
                        f"{file}, line 1: a CSV file must begin with the names of its columns, each "
                        f"once; it begins with {header!r:.80}."
                    )
                first = rows.line_num + 1
                for row in rows:
                    place, first = f"{file}, line {first}", rows.line_num + 1
                    if len(row) == len(header):
                        cells = dict(zip(header, row, strict=True))
                        content = {k: v or None for k, v in cells.items()}
                        records.append(Record(place, content, str(file.parent)))
                    elif row:
                        request.tally.bad(
                            DataError(
                                f"{place}: the row has {len(row)} cells and the header {len(header)}. "
                                "Correct or remove the row; text with commas or line ends must be "
                                "in double quotes."
                            )
                        )
            except csv.Error as error:
                raise DataError(
                    f"{file}, line {rows.line_num}: this is no CSV: {error}. Correct the file."
                ) from error
        return self.result(request, records)


class ParquetSource(FileSource):
    """Parquet files, which are mapped into memory and read row by row."""

    suffixes = (".parquet",)

    def read(self, request: SourceRequest) -> SourceRecords:
        """Return the rows of all files, in order.

        Raises:
            DataError: There is no file, or one is no parquet file.
        """
        import datasets  # heavy, as pyarrow, and only needed here
        import pyarrow.parquet

        files = self.files(request.path)

        def load() -> "Dataset":
            tables = [pyarrow.parquet.read_table(str(file), memory_map=True) for file in files]
            made = [datasets.Dataset(datasets.table.InMemoryTable(table)) for table in tables]
            return datasets.concatenate_datasets(made) if len(made) > 1 else made[0]

        path = str(request.path)
        return self.result(request, TableRecords(_loaded(load, f"data.path {path!r}"), path))


class SavedSource(FileSource):
    """A data set that ``datasets`` saved to disk; of several splits, ``data.split``."""

    suffixes = ()

    def read(self, request: SourceRequest) -> SourceRecords:
        """Return the rows.

        Raises:
            DataError: There is no saved data set, or it has no such split.
        """
        path = request.path
        loaded = _loaded(lambda: _saved(path, request.config.split), f"data.path {str(path)!r}")
        return self.result(request, TableRecords(loaded, str(path)))


class HubSource(DataSource):
    """A data set of the hub, or a local directory or file that ``datasets`` can load."""

    def check(self, config: DataConfig) -> None:
        """Check that ``data.dataset`` is set."""
        if not config.dataset:
            raise ConfigError(f'data.dataset must name the data set for source "{config.source}".')

    def read(self, request: SourceRequest) -> SourceRecords:
        """Return the rows of the split ``data.split`` of ``data.dataset``.

        Raises:
            DataError: It cannot be loaded, or has no such split.
        """
        config = request.config
        what = f"data.dataset {config.dataset!r}, subset {config.subset!r}, split {config.split!r}"
        loaded = _loaded(lambda: _from_hub(config), what)
        return SourceRecords(records=TableRecords(loaded, config.dataset), where=config.dataset)


def _loaded(load: Callable[[], "Dataset"], what: str) -> "Dataset":
    import datasets

    try:
        return load()
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{what} cannot be loaded: {error} Check the keys and the connection, or give a local "
            "path."
        ) from error


def _undecoded(dataset: "Dataset") -> "Dataset":
    """Return the data set with its images as they are stored, which a task decodes itself."""
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _saved(path: Path, split: str) -> "Dataset":
    import datasets

    saved = datasets.load_from_disk(str(path))
    return saved[split] if isinstance(saved, dict) else saved


def _from_hub(config: DataConfig) -> "Dataset":
    import datasets

    path = Path(config.dataset)
    if path.is_file():
        builder = _BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise DataError(
                f"data.dataset is the file {path}; its name must end in one of "
                f"{', '.join(_BUILDERS)}."
            )
        return datasets.load_dataset(builder, data_files=str(path), split=config.split)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, config.split)
    return datasets.load_dataset(config.dataset, config.subset or None, split=config.split)
