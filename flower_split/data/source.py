"""What a data source is: it reads the records of one client, or of all for a partitioner to divide.

Next: ``flower_split/data/sources``, one module for each that is built in.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from flower_split.config import DataConfig, Scalar
from flower_split.data.documents import Record
from flower_split.data.tally import Tally
from flower_split.errors import ConfigError, DataError

PARTITION_FIELD = "{partition_id}"
"""Stands for the client's partition in ``data.path``: every client has its own file."""

_GZIP = b"\x1f\x8b"  # the first bytes of such a file


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRequest:
    """What a source is asked for, the same for every call on behalf of one client."""

    config: DataConfig
    partition_id: int  # from 0
    num_partitions: int  # at least 1
    tally: Tally  # records that cannot be read are given to its bad()
    app: Mapping[str, Scalar] = field(default_factory=dict)  # the run config's keys under "app."

    @property
    def path(self) -> Path:
        """The client's ``data.path``."""
        text = self.config.path.replace(PARTITION_FIELD, str(self.partition_id))
        return Path(text).expanduser()


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRecords:
    """What a source gives: the same records in the same order whenever it is asked."""

    records: Sequence[Record]
    where: str  # for errors: a path, a data set's name
    own: bool = False  # they are this client's alone; otherwise a partitioner divides them
    name: str = ""  # what they are about, for people
    text_field: str = ""  # the field of running text; empty: data.text-field


class DataSource(ABC):
    """Where records come from; register one in the entry-point group ``flower_split.data_sources``.

    An instance is made without arguments for each client and asked once. It must depend on what it
    is given alone, so that a client that is restarted has the same data in the same order.
    """

    @abstractmethod
    def read(self, request: SourceRequest) -> SourceRecords:
        """Return the records.

        A record that cannot be read is given to ``request.tally.bad`` as a :class:`DataError` that
        names file and line; it raises, or counts it where the run leaves such records out.

        Raises:
            DataError: There is no data where the configuration says.
        """

    def check(self, config: DataConfig) -> None:  # noqa: B027 - a source may need nothing
        """Check, before anything starts, that the configuration has what :meth:`read` needs.

        Raises:
            ConfigError: A key is missing or wrong; names it.
        """


class FileSource(DataSource):
    """A source that reads the files of ``data.path``: the file itself, or those of a directory."""

    suffixes: ClassVar[tuple[str, ...]]

    def check(self, config: DataConfig) -> None:
        """Check that ``data.path`` is set."""
        if not config.path:
            raise ConfigError(
                f'data.path must name a file or directory for source "{config.source}".'
            )

    def files(self, path: Path) -> list[Path]:
        """Return ``path`` itself if it is a file, else its files with one of ``suffixes``, sorted.

        Raises:
            DataError: It is not there, or holds no such file.
        """
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise DataError(
                f"data.path must be a file or directory; {path} is not there. Give an absolute path: "
                "a relative one starts where the client's process runs."
            )
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in self.suffixes)
        if not files:
            raise DataError(
                f"data.path is the directory {path}, which holds no file ending in "
                f"{', '.join(self.suffixes)}. Give the file itself, or rename its files."
            )
        return files

    def result(self, request: SourceRequest, records: Sequence[Record]) -> SourceRecords:
        """Return ``records`` as the client's own if its path names the partition."""
        return SourceRecords(
            records=records,
            where=str(request.path),
            own=PARTITION_FIELD in request.config.path,
        )


def read_utf8(file: Path) -> str:
    """Return a text file's content, without a byte-order mark.

    Raises:
        DataError: It is compressed, not UTF-8, or cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        if error.object.startswith(_GZIP):
            raise DataError(
                f"{file}: text must not be compressed, and this file is gzip. Decompress it: "
                f"gunzip {file.name}."
            ) from error
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}: text must be UTF-8; byte {error.start} is not (line {line}). Convert the "
            "file."
        ) from error
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror}. Make it readable for this process."
        ) from error
