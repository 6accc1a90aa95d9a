"""TensorBoard: an event file in the run's directory."""

import shutil
from typing import TYPE_CHECKING, ClassVar

from flower_split.runs.loggers.logger import LoggedRun, PackageLogger, Record
from flower_split.runs.loggers.points import Curves
from flower_split.runs.summary import markdown_table

if TYPE_CHECKING:
    pass

FOLDER = "tensorboard"


class TensorBoardLogger(PackageLogger):
    """Writes ``tensorboard/`` of the run's directory; a resumed run's is written anew."""

    package: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"

    def start(self, run: LoggedRun) -> None:
        """See :class:`MetricLogger`."""
        from torch.utils.tensorboard import SummaryWriter

        folder = run.path / FOLDER
        if folder.exists():
            shutil.rmtree(folder)
        self._writer: SummaryWriter = SummaryWriter(str(folder))
        self._curves = Curves()
        settings = [[key, repr(value)] for key, value in run.config.items()]
        self._writer.add_text("settings", markdown_table([["key", "value"], *settings]))

    def log(self, record: Record) -> None:
        """See :class:`MetricLogger`."""
        for point in self._curves.points(record):
            self._writer.add_scalar(point.curve, point.value, point.at)
        if record.get("kind") == "round":
            self._writer.flush()

    def close(self) -> None:
        """See :class:`MetricLogger`."""
        self._writer.close()
