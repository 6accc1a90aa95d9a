"""The ServerApp's side of a committed round: the clients' adapter, the strategy's state, the manifest.

``checkpoints/`` in the run directory holds, beside the trunk's own files::

    server-3.<digest>.safetensors   the global adapter after round 3 and the strategy's state
    MANIFEST                        format; the two latest committed rounds: files, digests, the trunk's
    MANIFEST.previous               the manifest before

Renaming ``MANIFEST`` is the commit point of a round, for the trunk as well: it has prepared the round
before, and keeps or discards it by what the manifest says.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from safetensors.torch import save
from torch import Tensor

from flower_split.errors import RunDirectoryError
from flower_split.runtime import failpoints
from flower_split.runtime.atomic_files import remove_leftovers, write_atomically
from flower_split.runtime.file_formats import FileFormat
from flower_split.runtime.json_text import plain_file_name, read_json_object, record_of
from flower_split.runtime.secret_files import PRIVATE_DIRECTORY
from flower_split.runtime.tensor_bytes import tensors_from

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
_KEEP_ROUNDS = 2
_FORMAT = FileFormat(1, oldest=0)  # of the manifest and what it names
_ADAPTER, _STRATEGY = "adapter/", "strategy/"


class _Damaged(RunDirectoryError):
    """A file is not as it was written."""


@runtime_checkable
class Resumable(Protocol):
    """What an inner strategy with a state of its own offers, so that a run can be resumed."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the next round depends on, as named tensors."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go to a state of :meth:`state_dict`, bit for bit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedRound:
    """One entry of the manifest."""

    experiment: str
    server_round: int  # 0: before round 1
    attempt: int
    trunk_digest: str  # of the trunk's parameters after the round; empty for round 0
    trunk_version: int
    file: str
    file_sha256: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a run goes on from."""

    entry: CommittedRound
    adapter: dict[str, Tensor]
    strategy: dict[str, Tensor]


class RunCheckpoints:
    """The checkpoints of one run.

    Args:
        directory: Made by the first :meth:`commit`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def _manifest(self) -> Path:
        return self.directory / "MANIFEST"

    def commit(
        self,
        *,
        experiment: str,
        server_round: int,
        attempt: int,
        trunk_digest: str,
        trunk_version: int,
        adapter: Mapping[str, Tensor],
        strategy: Mapping[str, Tensor],
    ) -> None:
        """Commit a round: when this returns, it stays whatever dies; if it raises, it never was.

        Raises:
            RunDirectoryError: The disk is full or fails; the rounds before are intact.
        """
        failpoints.reach("server.commit.before")
        tensors = {_ADAPTER + name: tensor for name, tensor in adapter.items()}
        tensors |= {_STRATEGY + name: tensor for name, tensor in strategy.items()}
        # Cloned, because safetensors refuses tensors that share memory.
        content = save({n: tensors[n].detach().cpu().contiguous().clone() for n in sorted(tensors)})
        sha256 = hashlib.sha256(content).hexdigest()
        entry = CommittedRound(
            experiment=experiment,
            server_round=server_round,
            attempt=attempt,
            trunk_digest=trunk_digest,
            trunk_version=trunk_version,
            file=f"server-{server_round}.{sha256[:16]}.safetensors",
            file_sha256=sha256,
        )
        try:
            self.directory.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
            remove_leftovers(self.directory)
            write_atomically(self.directory / entry.file, content)
            failpoints.reach("server.commit.tensors-written")
            before = [e for e in self._entries_or_none(self._manifest) or [] if _before(e, entry)]
            if self._manifest.exists():
                write_atomically(
                    self._manifest.with_suffix(".previous"), self._manifest.read_bytes()
                )
            entries = [*before, entry][-_KEEP_ROUNDS:]
            write_atomically(self._manifest, _manifest_bytes(entries))
        except OSError as error:
            raise RunDirectoryError(
                f"round {server_round} cannot be committed: a checkpoint cannot be written to "
                f"{self.directory} ({error.strerror or error}). The rounds before it are intact: free "
                "space, and go on with resume."
            ) from error
        failpoints.reach("server.commit.manifest-written")
        self._prune()

    def latest(self, *, previous: bool = False) -> Resumed | None:
        """Return the round to go on from; None where none was committed.

        Args:
            previous: Go on from the round before the latest, or, where the manifest itself is
                damaged, from the manifest before.

        Raises:
            RunDirectoryError: It is damaged, or of another format; names the file and the remedy.
        """
        entries = self._entries_or_none(self._manifest) if previous else self._entries()
        if previous:
            if entries is None:
                entries = self._entries(self._manifest.with_suffix(".previous"))
            elif len(entries) > 1:
                entries = entries[:-1]
            else:
                raise RunDirectoryError(
                    f"{self._manifest} names no round before its latest. Set resume-previous = false."
                )
        if not entries:
            return None
        tensors = self._tensors(entries[-1])
        return Resumed(
            entries[-1],
            {n.removeprefix(_ADAPTER): t for n, t in tensors.items() if n.startswith(_ADAPTER)},
            {n.removeprefix(_STRATEGY): t for n, t in tensors.items() if n.startswith(_STRATEGY)},
        )

    def _tensors(self, entry: CommittedRound) -> dict[str, Tensor]:
        path = self.directory / entry.file
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != entry.file_sha256:
                raise _damaged(path, "its SHA-256 is not the one in MANIFEST")
            return tensors_from(content)
        except OSError as error:
            raise _damaged(path, f"it cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise _damaged(path, str(error)) from error

    def _entries(self, path: Path | None = None) -> list[CommittedRound]:
        path = path or self._manifest
        try:
            manifest = read_json_object(path.read_bytes())
            if problem := _FORMAT.problem(path, manifest.get("format", 0)):
                raise RunDirectoryError(problem)
            rounds = manifest.get("rounds")
            if not isinstance(rounds, list):
                raise ValueError("it has no list of rounds")
            entries = [_entry(values) for values in rounds]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _damaged(path, f"it cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise _damaged(path, str(error)) from error
        if manifest.get("sha256") != _digest(entries):
            raise _damaged(path, "its rounds have not the SHA-256 that it says")
        return entries

    def _entries_or_none(self, path: Path) -> list[CommittedRound] | None:
        try:
            return self._entries(path)
        except _Damaged as error:
            logger.warning("%s", error)
            return None

    def _prune(self) -> None:
        """Remove adapters that no manifest names."""
        keep: set[str] = set()
        for path in (self._manifest, self._manifest.with_suffix(".previous")):
            entries = self._entries_or_none(path)
            if entries is None:
                return
            keep |= {entry.file for entry in entries}
        for path in self.directory.glob("server-*.safetensors"):
            if path.name not in keep:
                path.unlink(missing_ok=True)


def _before(entry: CommittedRound, new: CommittedRound) -> bool:
    return entry.experiment == new.experiment and entry.server_round < new.server_round


def _entry(values: object) -> CommittedRound:
    """Read a round as the manifest tells it.

    Raises:
        ValueError: A value is missing, of another type, or names a file elsewhere.
    """
    entry = record_of(CommittedRound, values)
    plain_file_name(entry.file)
    return entry


def _digest(entries: list[CommittedRound]) -> str:
    text = json.dumps([asdict(entry) for entry in entries], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest_bytes(entries: list[CommittedRound]) -> bytes:
    manifest = {
        "format": _FORMAT.number,
        "rounds": [asdict(entry) for entry in entries],
        "sha256": _digest(entries),
    }
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _damaged(path: Path, why: str) -> _Damaged:
    return _Damaged(
        f"{path} is damaged: {why}. Go on from the round before with resume-previous = true, or "
        "restore the file."
    )
