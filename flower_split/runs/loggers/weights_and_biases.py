"""Weights & Biases: a run of the project ``flower_split``, offline where ``WANDB_MODE`` says so."""

from typing import TYPE_CHECKING, ClassVar

from flower_split.errors import ConfigError
from flower_split.runs.loggers.logger import LoggedRun, PackageLogger, Record
from flower_split.runs.loggers.points import Curves

if TYPE_CHECKING:
    from wandb import Run

PROJECT = "flower_split"  # WANDB_PROJECT names another one
_ROUND = "server_round"  # the axis of everything but steps


class WandbLogger(PackageLogger):
    """Logs to a run of the same name; a resumed run begins another one, of the same group."""

    package: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    def start(self, run: LoggedRun) -> None:
        """See :class:`MetricLogger`."""
        import wandb

        try:
            self._run: Run = wandb.init(
                project=wandb.setup().settings.project or PROJECT,
                name=run.name,
                group=run.name,
                dir=str(run.path),
                config=dict(run.config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f'train.report-to names "{self.extra}", which cannot begin: {error}. Log in (wandb login), '
                "or set WANDB_MODE=offline where the ServerApp runs."
            ) from error
        self._curves = Curves()
        self._axes: dict[str, str] = {}  # curve -> what it goes by

    def log(self, record: Record) -> None:
        """See :class:`MetricLogger`."""
        points = self._curves.points(record)
        if not points:
            return
        axis = _ROUND
        if record.get("kind") == "step":
            axis = f"step/number/client-{record['partition_id']}"
        for point in points:
            if point.curve not in self._axes:
                self._axes[point.curve] = axis
                self._run.define_metric(point.curve, step_metric=axis)
        self._run.log({axis: points[0].at, **{point.curve: point.value for point in points}})

    def close(self) -> None:
        """See :class:`MetricLogger`."""
        self._run.finish()
