"""MLflow: a run of the experiment ``flower_split``, where ``MLFLOW_TRACKING_URI`` says."""

from typing import TYPE_CHECKING, ClassVar

from flower_split.errors import ConfigError
from flower_split.runs.loggers.logger import LoggedRun, PackageLogger, Record
from flower_split.runs.loggers.points import Curves

if TYPE_CHECKING:
    pass

EXPERIMENT = "flower_split"
_MOST_PARAMETERS = 100  # of one request


class MlflowLogger(PackageLogger):
    """Logs to a run of the same name; a resumed run begins another one."""

    package: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"

    def start(self, run: LoggedRun) -> None:
        """See :class:`MetricLogger`."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        try:
            self._client: MlflowClient = MlflowClient()
            found = self._client.get_experiment_by_name(EXPERIMENT)
            experiment = (
                self._client.create_experiment(EXPERIMENT) if found is None else found.experiment_id
            )
            made = self._client.create_run(
                experiment, run_name=run.name, tags={"run-dir": str(run.path)}
            )
            self._id = str(made.info.run_id)
            parameters = [Param(key, str(value)) for key, value in run.config.items()]
            for first in range(0, len(parameters), _MOST_PARAMETERS):
                self._client.log_batch(
                    self._id, params=parameters[first : first + _MOST_PARAMETERS]
                )
        except MlflowException as error:
            raise ConfigError(
                f'train.report-to names "{self.extra}", which cannot begin: {error} Set '
                "MLFLOW_TRACKING_URI where the ServerApp runs."
            ) from error
        self._curves = Curves()

    def log(self, record: Record) -> None:
        """See :class:`MetricLogger`."""
        for point in self._curves.points(record):
            self._client.log_metric(self._id, point.curve, point.value, step=point.at)

    def close(self) -> None:
        """See :class:`MetricLogger`."""
        self._client.set_terminated(self._id)
