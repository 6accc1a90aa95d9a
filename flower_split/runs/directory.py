"""A run's directory: what is kept of a run, written so that a crash damages none of it.

Layout::

    config.json                    the resolved run config, flat, as parse_run_config reads it
    versions.json                  Python, this package and the libraries that computed the run
    metrics.jsonl                  one JSON object per line; "kind" is one of METRIC_KINDS
    adapters/client.safetensors    the clients' global adapter (bottom and top), fp32, at the ranks of
                                   lora.*.r: of a ΔW that the server keeps at a higher rank, the
                                   nearest of that rank (all of it is in checkpoints/)
    adapters/base.safetensors      methods that change the base: the low-rank change beside it, fp32
    clients/                       simulated clients' own factors (flower_split.runs.private_factors)
    adapters/trunk.safetensors     the trunk's adapter, fp32
    summary.json, report.md        the outcome, for programs and for people

Whole files appear by write, fsync, rename, so that no reader ever sees half of one; metrics are
appended line by line by the one process that owns the run.
"""

import json
import math
import os
import platform
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO, Self, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flower_split.config import RunConfig, parse_run_config, resolved_run_config
from flower_split.errors import ConfigError, RunDirectoryError
from flower_split.runs.summary import SummaryRow, markdown_table, summary_cells
from flower_split.runtime.atomic_files import write_atomically

Json: TypeAlias = "bool | int | float | str | None | Sequence[Json] | Mapping[str, Json]"

METRIC_KINDS = ("step", "round", "evaluation", "trunk", "aggregation", "arrival")
ADAPTER_PARTS = ("client", "base", "trunk")
_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "flwr", "flwr-datasets", "grpcio")
_ROUND_COLUMNS = ("server_round", "train_loss", "eval_loss", "perplexity", "num_tokens", "seconds")


class RunDirectory:
    """One run's directory. Made by :meth:`create` or :meth:`open`, never directly.

    Attributes:
        path: The directory, absolute.
        config: The run's resolved configuration.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, config: RunConfig) -> Self:
        """Make the directory ``config.run_dir``, or ``runs/<UTC time>-<id>`` where this runs.

        Raises:
            RunDirectoryError: The directory exists and is not empty, or cannot be made.
        """
        name = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + "-" + secrets.token_hex(3)
        path = Path(config.run_dir or Path("runs") / name).expanduser().absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise RunDirectoryError(
                    f"a new run needs an empty directory; {path} holds files. "
                    "Name another one in run-dir, or leave run-dir empty."
                )
            (path / "adapters").mkdir()
        except OSError as error:
            raise RunDirectoryError(
                f"the run directory {path} cannot be made: {error.strerror}. Name one in run-dir "
                "that this user may write."
            ) from error
        run = cls(path, config)
        run._write_json("versions.json", software_versions())
        run._write_json("config.json", resolved_run_config(config))
        return run

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open an existing run's directory.

        Raises:
            RunDirectoryError: It is no run directory, or its config is damaged; names the file.
        """
        path = Path(path).expanduser().absolute()
        if not path.is_dir():
            raise RunDirectoryError(f"there is no run directory {path}. Check the path.")
        values = _read_json(path / "config.json")
        try:
            config = parse_run_config(values)  # type: ignore[arg-type]  # it checks every type
        except ConfigError as error:
            raise RunDirectoryError(
                f"{path / 'config.json'} is no run config of this version: {error} "
                "Open the run with the version in its versions.json."
            ) from error
        return cls(path, config)

    def append(self, kind: str, record: Mapping[str, Json]) -> None:
        """Append one record to ``metrics.jsonl`` and flush; NaN and infinities become null.

        A torn last line, left by a process that died while writing, is cut off first.

        Raises:
            RunDirectoryError: ``kind`` is none of :data:`METRIC_KINDS`.
        """
        if kind not in METRIC_KINDS:
            raise RunDirectoryError(
                f"a metric's kind must be one of {', '.join(METRIC_KINDS)}; it is {kind!r}."
            )
        line = json.dumps(_finite({**record, "kind": kind}), allow_nan=False) + "\n"
        with open(self.path / "metrics.jsonl", "ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())
            file.flush()

    def metrics(self, kind: str | None = None) -> list[dict[str, Json]]:
        """The records of ``metrics.jsonl`` so far, of one kind or all, less a torn last line.

        Raises:
            RunDirectoryError: A complete line is no JSON object; names the line.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        records: list[dict[str, Json]] = []
        complete = path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(complete, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise RunDirectoryError(
                    f"{path}, line {number}: every line must be a JSON object; this one is not. "
                    "Remove the line, or restore the file."
                )
            if kind is None or record.get("kind") == kind:
                records.append(record)
        return records

    def replace_metrics(self, records: Sequence[Mapping[str, Json]]) -> None:
        """Write ``metrics.jsonl`` anew, with ``records`` as :meth:`metrics` gave them."""
        if records or (self.path / "metrics.jsonl").exists():
            lines = [json.dumps(_finite(record), allow_nan=False) + "\n" for record in records]
            write_atomically(self.path / "metrics.jsonl", "".join(lines).encode())

    def write_adapter(self, part: str, state: Mapping[str, Tensor]) -> Path:
        """Write ``adapters/<part>.safetensors``; tensors by their unsplit names, sorted."""
        path = self._adapter_path(part)
        tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
        write_atomically(path, save(tensors, metadata={"format": "pt"}))
        return path

    def read_adapter(self, part: str) -> dict[str, Tensor]:
        """The tensors of ``adapters/<part>.safetensors``, sorted by name.

        Raises:
            RunDirectoryError: The file is missing (the run did not finish) or damaged.
        """
        path = self._adapter_path(part)
        try:
            state = load(path.read_bytes())
        except FileNotFoundError as error:
            raise RunDirectoryError(
                f"{path} is missing: the run did not finish. Run it again to its end."
            ) from error
        except SafetensorError as error:
            raise RunDirectoryError(
                f"{path} is damaged: {error}. Restore the file, or run again."
            ) from error
        return dict(sorted(state.items()))

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
        clients = [_finite(asdict(row)) for row in rows]
        self._write_json(
            "summary.json",
            {
                "clients": clients[:-1],
                "overall": clients[-1] if clients else None,
                "facts": _finite(facts),
                "notes": list(notes),
            },
        )
        write_atomically(self.path / "report.md", self._report(rows, facts, notes).encode())

    def summary(self) -> dict[str, Json]:
        """The content of ``summary.json``.

        Raises:
            RunDirectoryError: The file is missing (the run did not finish) or damaged.
        """
        return _read_json(self.path / "summary.json")

    def _report(
        self, rows: Sequence[SummaryRow], facts: Mapping[str, Json], notes: Sequence[str]
    ) -> str:
        parts = [f"# Run {self.path.name}", *(f"> {note}" for note in notes)]
        if rows:
            parts += ["## Held-out perplexity", markdown_table(summary_cells(rows))]
        if facts:
            lines = [["what", "value"], *([label, _show(value)] for label, value in facts.items())]
            parts += ["## The run", markdown_table(lines)]
        rounds = self.metrics("round")
        columns = [name for name in _ROUND_COLUMNS if any(name in record for record in rounds)]
        if columns:
            body = [[_show(record.get(name)) for name in columns] for record in rounds]
            parts += ["## Rounds", markdown_table([columns, *body])]
        keys = resolved_run_config(self.config)
        settings = [["key", "value"], *([f"`{k}`", f"`{v!r}`"] for k, v in keys.items())]
        versions = _read_json(self.path / "versions.json")
        software = [["software", "version"], *([k, str(v)] for k, v in versions.items())]
        parts += ["## Settings", markdown_table(settings), markdown_table(software)]
        return "\n\n".join(parts) + "\n"

    def _adapter_path(self, part: str) -> Path:
        if part not in ADAPTER_PARTS:
            raise RunDirectoryError(
                f"an adapter's part must be one of {', '.join(ADAPTER_PARTS)}; it is {part!r}."
            )
        return self.path / "adapters" / f"{part}.safetensors"

    def _write_json(self, name: str, content: Mapping[str, Json]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(self.path / name, (text + "\n").encode())


def _read_json(path: Path) -> dict[str, Json]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{path} is missing: {path.parent} is no run directory, or its run did not get that "
            "far. Give the directory that the run printed."
        ) from error
    except ValueError as error:
        raise RunDirectoryError(
            f"{path} is damaged: {error}. Restore the file, or run again."
        ) from error
    if not isinstance(content, dict):
        raise RunDirectoryError(
            f"{path} must hold a JSON object; it holds a {type(content).__name__}. "
            "Restore the file, or run again."
        )
    return content


def software_versions() -> dict[str, str]:
    """Versions of everything that computes a run; "absent" for a library that is not there."""
    found = {"python": platform.python_version()}
    for name in ("flower-split", *_LIBRARIES):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            found[name.replace("-", "_")] = "absent"
    return found


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _finite(value: Json) -> Json:
    """``value`` with null for every number that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def _show(value: Json) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
