"""The quick-start's source: documentation of the installed standard library."""

from flower_split.data.documents import Record
from flower_split.data.source import DataSource, SourceRecords, SourceRequest
from flower_split.data.stdlib_docs import AREAS, Area, area_docstrings

AREA_FIELD = "area"


class DocumentationSource(DataSource):
    """One area of the standard library's documentation for each client, or all for a partitioner."""

    def read(self, request: SourceRequest) -> SourceRecords:
        """Return the client's area, one docstring a record; all areas where they are divided anew.

        Raises:
            DataError: The library's source is not there, or cannot feed so many clients.
        """
        if request.config.partition_by != AREA_FIELD:
            area = area_docstrings(request.partition_id, request.num_partitions)
            records = [Record(_place(area), {"text": text}) for text in area.docstrings]
            return SourceRecords(
                records=records, where=area.name, own=True, name=area.name, text_field="text"
            )
        areas = [area_docstrings(number, len(AREAS)) for number in range(len(AREAS))]
        records = [
            Record(_place(area), {"text": text, AREA_FIELD: area.name})
            for area in areas
            for text in area.docstrings
        ]
        where = "the standard library's documentation"
        return SourceRecords(records=records, where=where, text_field="text")


def _place(area: Area) -> str:
    return f"{area.name}, docstring"
