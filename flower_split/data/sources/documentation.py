"""The quick-start's source: documentation of the installed standard library."""

from flower_split.data.documents import Record
from flower_split.data.source import DataSource, SourceRecords, SourceRequest
from flower_split.data.stdlib_docs import area_docstrings


class DocumentationSource(DataSource):
    """One area of the standard library's documentation for each client."""

    def read(self, request: SourceRequest) -> SourceRecords:
        """Return the client's area, one docstring a record.

        Raises:
            DataError: The library's source is not there, or cannot feed so many clients.
        """
        area = area_docstrings(request.partition_id, request.num_partitions)
        records = [Record(f"{area.name}, docstring", {"text": text}) for text in area.docstrings]
        return SourceRecords(
            records=records, where=area.name, own=True, name=area.name, text_field="text"
        )
