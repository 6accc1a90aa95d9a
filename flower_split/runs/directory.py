"""One run's directory, written so that a crash damages nothing in it.

Layout::

    config.json                    the resolved run config, flat, as parse_run_config reads it
    versions.json                  Python, this package and the libraries that computed the run
    metrics.jsonl                  one JSON object per line (flower_split.runs.metrics)
    adapters/client.safetensors    the clients' global adapter (bottom and top), fp32, at the ranks of
                                   lora.*.r: of a ΔW that the server keeps at a higher rank, the
                                   nearest of that rank (all of it is in checkpoints/)
    adapters/base.safetensors      methods that change the base: the low-rank change beside it, fp32
    clients/                       simulated clients' own factors (flower_split.runs.private_factors)
    adapters/trunk.safetensors     the trunk's adapter, fp32
    summary.json, report.md        the outcome, for programs and for people
    report.html                    the same with charts, where the extra "report" is installed
    flower/                        the local SuperLink of flower-split run, and its log

Whole files appear by write, fsync, rename, so that no reader ever sees half of one; metrics are
appended line by line by the one process that owns the run.
"""

import platform
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from safetensors.torch import save
from torch import Tensor

from flower_split.config import RunConfig, resolved_run_config
from flower_split.errors import RunDirectoryError
from flower_split.runs.files import (
    Json,
    check_new_directory,
    finite,
    read_config,
    read_json,
    write_json,
)
from flower_split.runs.metrics import BYTE_KINDS, append_metric, read_metrics, write_metrics
from flower_split.runs.metrics import FILE as METRICS
from flower_split.runs.resuming import check_may_change
from flower_split.runs.summary import SummaryRow, markdown_table, summary_cells
from flower_split.runtime.atomic_files import write_atomically
from flower_split.runtime.secret_files import PRIVATE_DIRECTORY
from flower_split.runtime.tensor_bytes import tensors_from

ADAPTER_PARTS = ("client", "base", "trunk")
_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "flwr", "flwr-datasets", "grpcio")
_ROUND_COLUMNS = ("server_round", "train_loss", "eval_loss", "perplexity", "num_tokens", "seconds")


class RunDirectory:
    """One run's directory. Made by :meth:`create` or :meth:`open`, never directly.

    Attributes:
        path: The directory, absolute.
        config: The run's resolved configuration.
        listeners: Told every record that is appended, as :meth:`metrics` gives it.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config
        self.listeners: list[Callable[[Mapping[str, Json]], None]] = []

    @classmethod
    def create(cls, config: RunConfig) -> Self:
        """Make the directory ``config.run_dir``, or ``runs/<UTC time>-<id>`` where this runs.

        Raises:
            RunDirectoryError: The directory exists and is not empty, or cannot be made.
        """
        name = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + "-" + secrets.token_hex(3)
        path = Path(config.run_dir or Path("runs") / name).expanduser().absolute()
        check_new_directory(path)
        try:
            path.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
            (path / "adapters").mkdir()
        except OSError as error:
            raise RunDirectoryError(
                f"the run directory {path} cannot be made: {error.strerror}. Name one in run-dir "
                "that this user may write."
            ) from error
        write_json(path / "versions.json", software_versions())
        write_json(path / "config.json", resolved_run_config(config))
        return cls(path, config)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open an existing run's directory.

        Raises:
            RunDirectoryError: It is no run directory, or its config is damaged; names the file.
        """
        path = Path(path).expanduser().absolute()
        return cls(path, read_config(path))

    @classmethod
    def resume(cls, config: RunConfig) -> Self:
        """Open the directory of the run that ``config.resume`` names, to go on with ``config``.

        More rounds than before are noted in its ``config.json``.

        Raises:
            RunDirectoryError: It is no run directory, or a key differs that may not change.
        """
        run = cls.open(config.resume)
        before = run.config
        check_may_change(before, config)
        if config.num_server_rounds != before.num_server_rounds:
            run.config = replace(before, num_server_rounds=config.num_server_rounds)
            write_json(run.path / "config.json", resolved_run_config(run.config))
        return run

    def append(self, kind: str, record: Mapping[str, Json]) -> None:
        """Append one record to ``metrics.jsonl``; see :func:`flower_split.runs.metrics.append_metric`.

        Raises:
            RunDirectoryError: The record is none of the schema's.
        """
        line = append_metric(self.path / METRICS, kind, record)
        for listener in list(self.listeners):
            listener(line)

    def metrics(self, kind: str | None = None) -> list[dict[str, Json]]:
        """Return the records of ``metrics.jsonl`` so far, of one kind or all.

        Raises:
            RunDirectoryError: A complete line is no JSON object; names the line.
        """
        return read_metrics(self.path / METRICS, kind)

    def replace_metrics(self, records: Sequence[Mapping[str, Json]]) -> None:
        """Write ``metrics.jsonl`` anew, with ``records`` as :meth:`metrics` gave them."""
        write_metrics(self.path / METRICS, records)

    def write_adapter(self, part: str, state: Mapping[str, Tensor]) -> Path:
        """Write ``adapters/<part>.safetensors``; tensors by their unsplit names, sorted."""
        path = self._adapter_path(part)
        tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
        write_atomically(path, save(tensors, metadata={"format": "pt"}))
        return path

    def read_adapter(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of ``adapters/<part>.safetensors``, sorted by name.

        Raises:
            RunDirectoryError: The file is missing (the run did not finish) or damaged.
        """
        path = self._adapter_path(part)
        try:
            return tensors_from(path.read_bytes())
        except FileNotFoundError as error:
            raise RunDirectoryError(
                f"{path} is missing: the run did not finish. Run it again to its end."
            ) from error
        except ValueError as error:
            raise RunDirectoryError(
                f"{path} is damaged: {error}. Restore the file, or run again."
            ) from error

    def write_outcome(
        self,
        rows: Sequence[SummaryRow],
        *,
        facts: Mapping[str, Json],
        notes: Sequence[str] = (),
    ) -> None:
        """Write ``summary.json`` and ``report.md``: the run's end.

        Args:
            rows: From :func:`summarize`; empty if nothing was evaluated.
            facts: Label → value in the order to show: seconds, steps, tokens, bytes ...
            notes: Sentences a reader must not miss, such as that the bottom did not train.
        """
        clients = [finite(asdict(row)) for row in rows]
        write_json(
            self.path / "summary.json",
            {
                "clients": clients[:-1],
                "overall": clients[-1] if clients else None,
                "facts": finite(facts),
                "bytes": bytes_by_client(self.metrics("bytes")),
                "notes": list(notes),
            },
        )
        write_atomically(self.path / "report.md", self._report(rows, facts, notes).encode())

    def summary(self) -> dict[str, Json]:
        """Return the content of ``summary.json``.

        Raises:
            RunDirectoryError: The file is missing (the run did not finish) or damaged.
        """
        return read_json(self.path / "summary.json")

    def _report(
        self, rows: Sequence[SummaryRow], facts: Mapping[str, Json], notes: Sequence[str]
    ) -> str:
        parts = [f"# Run {self.path.name}", *(f"> {note}" for note in notes)]
        if rows:
            parts += ["## Held-out perplexity", markdown_table(summary_cells(rows))]
        if facts:
            lines = [["what", "value"], *([label, _show(value)] for label, value in facts.items())]
            parts += ["## The run", markdown_table(lines)]
        counted = bytes_by_client(self.metrics("bytes"))
        if counted:
            parts += ["## Bytes sent and received, by client", _bytes_table(counted)]
        rounds = self.metrics("round")
        columns = [name for name in _ROUND_COLUMNS if any(name in record for record in rounds)]
        if columns:
            body = [[_show(record.get(name)) for name in columns] for record in rounds]
            parts += ["## Rounds", markdown_table([columns, *body])]
        keys = resolved_run_config(self.config)
        settings = [["key", "value"], *([f"`{k}`", f"`{v!r}`"] for k, v in keys.items())]
        versions = read_json(self.path / "versions.json")
        software = [["software", "version"], *([k, str(v)] for k, v in versions.items())]
        parts += ["## Settings", markdown_table(settings), markdown_table(software)]
        return "\n\n".join(parts) + "\n"

    def _adapter_path(self, part: str) -> Path:
        if part not in ADAPTER_PARTS:
            raise RunDirectoryError(
                f"an adapter's part must be one of {', '.join(ADAPTER_PARTS)}; it is {part!r}."
            )
        return self.path / "adapters" / f"{part}.safetensors"


def bytes_by_client(records: Sequence[Mapping[str, Json]]) -> dict[str, dict[str, int]]:
    """Sum the records of kind "bytes": partition, or "all", -> kind and direction -> bytes."""
    totals: dict[str, Counter[str]] = {}
    for record in records:
        for whose in (str(record["partition_id"]), "all"):
            counts = totals.setdefault(whose, Counter())
            for name in BYTE_KINDS:
                value = record.get(name)
                if isinstance(value, int):
                    counts[name] += value
    ordered = sorted(totals, key=lambda whose: (whose == "all", whose.zfill(9)))
    return {whose: dict(totals[whose]) for whose in ordered}


def _bytes_table(counted: Mapping[str, Mapping[str, int]]) -> str:
    """Return a table with a row for each kind and direction, and a column for each client."""
    kinds = [name for name in BYTE_KINDS if any(name in c for c in counted.values())]
    header = ["bytes", *counted]
    rows = [[name, *(f"{c.get(name, 0):,}" for c in counted.values())] for name in kinds]
    return markdown_table([header, *rows])


def software_versions() -> dict[str, str]:
    """Return the versions of all that computes a run; "absent" for a library that is missing."""
    found = {"python": platform.python_version()}
    for name in ("flower-split", *_LIBRARIES):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            found[name.replace("-", "_")] = "absent"
    return found


def _show(value: Json) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
