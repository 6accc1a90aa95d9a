"""A run's metrics as pandas DataFrames, one for each kind of line in ``metrics.jsonl``."""

from pathlib import Path
from typing import TYPE_CHECKING

from flower_split.errors import ConfigError
from flower_split.runs.files import read_config
from flower_split.runs.metrics import COMMON, FILE, SCHEMA, read_metrics

if TYPE_CHECKING:
    import pandas


def load(run: Path | str) -> "dict[str, pandas.DataFrame]":
    """Read a run's metrics, of a finished run or of one that goes on.

    Args:
        run: The run directory.

    Returns:
        Kind -> its lines, in the order they were written: the columns of
        :data:`flower_split.runs.metrics.COMMON` first, ``time`` as UTC timestamps, then the kind's
        own. Every kind of :data:`flower_split.runs.metrics.SCHEMA` is there; one without a line is
        empty.

    Raises:
        ConfigError: pandas is not installed.
        RunDirectoryError: It is no run directory, or a line is damaged; names the line.
    """
    try:
        import pandas  # heavy, and only needed here
    except ImportError as error:
        raise ConfigError(
            "flower_split.results.load needs pandas, which is not installed. Install it: "
            "pip install pandas"
        ) from error
    path = Path(run).expanduser().absolute()
    read_config(path)  # says so, where this is no run directory
    records = read_metrics(path / FILE)
    frames = {}
    for kind, described in SCHEMA.items():
        lines = [record for record in records if record.get("kind") == kind]
        known = [*COMMON, *described.fields]
        found = {name for line in lines for name in line}
        columns = [name for name in known if name in found or not lines]
        columns += sorted(found - set(known))
        frame = pandas.DataFrame(lines, columns=columns)
        if "time" in frame:
            frame["time"] = pandas.to_datetime(frame["time"], utc=True, format="ISO8601")
        frames[kind] = frame
    return frames
