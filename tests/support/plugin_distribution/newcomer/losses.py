"""A logger: every loss that a client trains with, in a text file of the run's directory."""

from flower_split.runs.loggers.logger import LoggedRun, MetricLogger, Record


class LossesLogger(MetricLogger):
    """Writes ``losses.txt``: partition, round and loss, a line for each step."""

    def start(self, run: LoggedRun) -> None:
        """See :class:`MetricLogger`."""
        self._file = (run.path / "losses.txt").open("w", encoding="utf-8")

    def log(self, record: Record) -> None:
        """See :class:`MetricLogger`."""
        if record["kind"] == "step":
            line = f"{record['partition_id']} {record['server_round']} {record['loss']}"
            self._file.write(line + "\n")

    def close(self) -> None:
        """See :class:`MetricLogger`."""
        self._file.close()
