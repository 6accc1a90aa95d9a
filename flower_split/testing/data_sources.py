"""The contract of a data source, checked on the data that its author gives."""

from flower_split.config import DataConfig
from flower_split.data.documents import Record
from flower_split.data.formats import parse_record
from flower_split.data.source import DataSource, SourceRecords, SourceRequest
from flower_split.data.tally import Tally
from flower_split.errors import ConfigError, DataError
from flower_split.testing.failures import ConformanceError, require


def check_data_source(
    source: type[DataSource], config: DataConfig, *, num_partitions: int = 2
) -> None:
    """Check that a source keeps the contract of :class:`flower_split.data.DataSource`.

    It must be made without arguments, give every client the same records in the same order
    whenever it is asked, name where each stands, and give records that are understood.

    Args:
        source: The class.
        config: Names small data that the source can read, and no bad record.
        num_partitions: Of how many clients' data; ``config.path`` has that of each.

    Raises:
        ConformanceError: It breaks its contract; the first broken clause is named.

    Example:
        >>> from pathlib import Path
        >>> from flower_split.config import DataConfig
        >>> from flower_split.data.sources.text import TextSource
        >>> from flower_split.testing import check_data_source
        >>> config = DataConfig(source="text", path="notes.txt")
        >>> _ = Path("notes.txt").write_text("one paragraph")
        >>> check_data_source(TextSource, config)
    """
    subject = f"data source {source.__name__}"
    try:
        source().check(config)
    except TypeError as error:
        raise ConformanceError(f"{subject} must be made without arguments: {error}") from error
    except ConfigError as error:
        raise ConformanceError(
            f"{subject} must accept the configuration that it is checked with: {error}"
        ) from error
    read = [
        _read(source, subject, config, number, num_partitions) for number in range(num_partitions)
    ]
    shared = [one for one in read if not one.own]
    require(
        len(shared) in (0, len(read)),
        subject,
        "say own for all clients or for none: a partitioner divides what is no client's own",
    )
    for one in shared[1:]:
        require(
            list(one.records) == list(shared[0].records),
            subject,
            "give every client the same records in the same order where they are to be divided",
        )


def _read(
    source: type[DataSource], subject: str, config: DataConfig, number: int, count: int
) -> SourceRecords:
    first, again = (
        _ask(source, subject, config, number, count),
        _ask(source, subject, config, number, count),
    )
    require(
        list(first.records) == list(again.records) and first.own == again.own,
        subject,
        "give the same records in the same order when it is asked again",
    )
    require(len(first.records) > 0, subject, f"give partition {number} a record")
    require(bool(first.where), subject, "say in where what it has read")
    for record in first.records:
        require(
            isinstance(record, Record) and bool(record.place),
            subject,
            f"give records that name their place; it gave {record!r}",
        )
    places = [record.place for record in first.records]
    require(len(set(places)) == len(places), subject, "name another place for each record")
    _understood(subject, first, config)
    return first


def _ask(
    source: type[DataSource], subject: str, config: DataConfig, number: int, count: int
) -> SourceRecords:
    request = SourceRequest(config=config, partition_id=number, num_partitions=count, tally=Tally())
    try:
        return source().read(request)
    except DataError as error:
        raise ConformanceError(f"{subject} must read the data that it is given: {error}") from error


def _understood(subject: str, read: SourceRecords, config: DataConfig) -> None:
    field = read.text_field or config.text_field
    ignored = config.ignored | ({config.partition_by} - {""})
    for record in read.records:
        try:
            parse_record(record, field, ignored)
        except DataError as error:
            raise ConformanceError(
                f"{subject} must give records of a known format: {error}"
            ) from error
