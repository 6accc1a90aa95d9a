"""The trunk's checkpoints: what a round ended with, on disk before the round is committed.

One directory for each experiment, and in it for each round::

    trunk-3.<digest>.safetensors   trainable parameters and optimizer state, as they are in memory
    trunk-3.json                   format, round, attempt, version, digests; names the file above

The JSON file is written last and by rename: with it the checkpoint is there, without it it is not.
The trunk writes at PrepareRound and never decides which round counts: the coordinator names the
round that the next one begins with, and whatever is newer is discarded.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from safetensors.torch import save
from torch import Tensor

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.runtime import failpoints
from flower_split.runtime.atomic_files import remove_leftovers, write_atomically
from flower_split.runtime.file_formats import FileFormat
from flower_split.runtime.json_text import plain_file_name, read_json_object, record_of
from flower_split.runtime.secret_files import PRIVATE_DIRECTORY
from flower_split.runtime.tensor_bytes import tensors_from

logger = logging.getLogger(__name__)

KEEP_ROUNDS = 2
_FORMAT = FileFormat(1, oldest=0)  # of both files
_NO_WEIGHTS = "the trunk has not the weights that this round begins with"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkCheckpoint:
    """What ``trunk-<round>.json`` says."""

    experiment: str
    server_round: int
    attempt: int
    version: int  # optimizer steps taken
    digest: str  # SHA-256 of the trainable parameters, as in the round's report
    file: str  # the tensors' file
    file_sha256: str
    ledger: str  # of the contributions that the round counted, whatever their order


class CheckpointStore:
    """The checkpoints in one directory. One process at a time writes to it.

    Args:
        directory: Made if it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(
        self,
        tensors: Mapping[str, Tensor],
        *,
        experiment: str,
        server_round: int,
        attempt: int,
        version: int,
        digest: str,
        ledger: str,
    ) -> None:
        """Write what a round ended with; a former checkpoint of the same round is replaced.

        Raises:
            OSError: It cannot be written; all former checkpoints are intact.
        """
        folder = self._folder(experiment)
        folder.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        remove_leftovers(folder)
        content = save({name: tensors[name] for name in sorted(tensors)})
        sha256 = hashlib.sha256(content).hexdigest()
        record = TrunkCheckpoint(
            experiment=experiment,
            server_round=server_round,
            attempt=attempt,
            version=version,
            digest=digest,
            file=f"trunk-{server_round}.{sha256[:16]}.safetensors",
            file_sha256=sha256,
            ledger=ledger,
        )
        write_atomically(folder / record.file, content)
        failpoints.reach("trunk.prepare.tensors-written")
        text = json.dumps({"format": _FORMAT.number, **asdict(record)}, indent=2) + "\n"
        write_atomically(folder / f"trunk-{server_round}.json", text.encode())

    def load(
        self, experiment: str, server_round: int, digest: str
    ) -> tuple[TrunkCheckpoint, dict[str, Tensor]]:
        """Return the checkpoint of a round, whole and with the parameters' digest that is asked for.

        Raises:
            TrunkRefused: It is missing, damaged, another one, or of another format (NO_CHECKPOINT); names
                the file.
        """
        path = self._folder(experiment) / f"trunk-{server_round}.json"
        record = self._read(path)
        if record is None:
            raise _no_checkpoint(f"{path} is missing.")
        if record.digest != digest or record.experiment != experiment:
            raise _no_checkpoint(
                f"{path} is of weights {record.digest[:16]}; the coordinator's manifest names "
                f"{digest[:16]}."
            )
        file = path.with_name(record.file)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise _no_checkpoint(f"{file} cannot be read ({error.strerror}).") from error
        if hashlib.sha256(content).hexdigest() != record.file_sha256:
            raise _no_checkpoint(f"{file} is damaged: its SHA-256 is not the one in {path.name}.")
        try:
            return record, tensors_from(content)
        except ValueError as error:
            raise _no_checkpoint(f"{file} is damaged: {error}.") from error

    def discard_after(self, experiment: str, server_round: int) -> None:
        """Remove checkpoints of rounds that were prepared and never committed."""
        self._remove(experiment, lambda number: number > server_round)

    def prune(self, experiment: str, server_round: int) -> None:
        """Keep the :data:`KEEP_ROUNDS` latest rounds up to ``server_round``."""
        self._remove(experiment, lambda number: number <= server_round - KEEP_ROUNDS)

    def _remove(self, experiment: str, unwanted: Callable[[int], bool]) -> None:
        folder = self._folder(experiment)
        keep: set[str] = set()
        for path in sorted(folder.glob("trunk-*.json")):
            number = _round_of(path)
            if number is not None and unwanted(number):
                path.unlink(missing_ok=True)
                logger.debug("removed %s", path)
        for path in folder.glob("trunk-*.json"):
            record = self._read_quietly(path)
            if record is not None:
                keep.add(record.file)
            else:  # damaged: leave the tensors of its round for whoever looks into it
                keep |= {file.name for file in folder.glob(f"{path.stem}.*.safetensors")}
        for path in folder.glob("trunk-*.safetensors"):
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def _folder(self, experiment: str) -> Path:
        return self.directory / ("trunk-" + quote(experiment, safe=""))

    def _read(self, path: Path) -> TrunkCheckpoint | None:
        try:
            values = read_json_object(path.read_bytes())
            if problem := _FORMAT.problem(path, values.pop("format", 0)):
                raise TrunkRefused(RefusalReason.NO_CHECKPOINT, f"{_NO_WEIGHTS}: {problem}")
            record = record_of(TrunkCheckpoint, values)
            plain_file_name(record.file)
            return record
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _no_checkpoint(f"{path} is damaged: {error}.") from error

    def _read_quietly(self, path: Path) -> TrunkCheckpoint | None:
        try:
            return self._read(path)
        except TrunkRefused:
            return None


def _round_of(path: Path) -> int | None:
    number = path.stem.removeprefix("trunk-")
    return int(number) if number.isdigit() else None


def _no_checkpoint(what: str) -> TrunkRefused:
    return TrunkRefused(
        RefusalReason.NO_CHECKPOINT,
        f"{_NO_WEIGHTS}: {what} Resume from the round "
        "before (resume-previous = true), restore the file, or begin a new run.",
    )
