"""A data source: one record for each line that begins with a dash."""

from flower_split.config import DataConfig
from flower_split.data import DataSource, Record, SourceRecords, SourceRequest
from flower_split.errors import ConfigError, DataError


class NotesSource(DataSource):
    """Read the dashed lines of the file ``data.path``."""

    def check(self, config: DataConfig) -> None:
        """Check that a file is named."""
        if not config.path:
            raise ConfigError("data.path must name the file of notes.")

    def read(self, request: SourceRequest) -> SourceRecords:
        """Return the notes, each as running text."""
        try:
            lines = request.path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"{request.path} cannot be read: {error.strerror}.") from error
        records = [
            Record(f"{request.path}, line {number}", {"text": line.removeprefix("- ")})
            for number, line in enumerate(lines, start=1)
            if line.startswith("- ")
        ]
        own = "{partition_id}" in request.config.path
        return SourceRecords(records=records, where=str(request.path), own=own, text_field="text")
