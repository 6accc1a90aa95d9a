"""What stays with a client on its own disk, exactly once: FedSA-LoRA's B, the optimizer's state.

A client trains its private factors in every round, and its optimizer's state grows with them; it
sends back only the digest of both. The server keeps the digest of the last *committed* round of every
client, in its checkpoint, and names it in the next message: a client goes on from exactly those
values, whatever rounds were aborted, tried again or rolled back since, on either side. Values of a
round that was not committed are never read, and the server never sees one.

Layout, under the client's directory::

    run-<experiment>/partition-<id>/round-<r>.<digest>.safetensors

A file's header has its format, and names the file that its round began with. Those two generations
are kept, for a run may go back to the round before its last; everything else of earlier rounds goes
when the client trains next. Nothing of the same or a later round is ever removed, so that a process
that was given up and comes to life again cannot take away what the run has gone on with.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors.torch import save
from torch import Tensor

from flower_split.config import RunConfig
from flower_split.errors import FederationError, RunDirectoryError
from flower_split.runtime.atomic_files import write_atomically
from flower_split.runtime.file_formats import FileFormat
from flower_split.runtime.flower_home import flower_home
from flower_split.runtime.json_text import read_json_object
from flower_split.runtime.simulation import SIMULATED, simulated_clients_at_once
from flower_split.runtime.tensor_bytes import tensors_from

FOLDER = "clients"
"""In the run directory: where simulated clients keep what is theirs."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_DIGEST_BYTES = 32
_FILE = re.compile(r"\.?round-(?P<round>\d+)\.(?P<digest>[0-9a-f]{64})\.safetensors(\..*\.tmp)?")
_ORIGIN = "round-and-base"  # and the format, after them
_STATE = "private/"
_FORMAT = FileFormat(1, oldest=0)

OPTIMIZER = "optimizer/"
"""Before the names of the optimizer's state in a client's file; other names are of the adapter."""
PERSONAL = "personal/"
"""Before the names of the adapter as the client has trained it, where its own model is evaluated."""


def client_directory(config: RunConfig, node_config: Mapping[str, object], simulated: str) -> Path:
    """Return where this client keeps what is its own.

    The node config's ``client-dir``, or ``train.client-dir``; else a folder of the run directory for a
    simulated client, and of Flower's home for one on a machine of its own.

    Args:
        config: The run's configuration.
        node_config: Of this client's SuperNode.
        simulated: The folder of the run directory, as the ServerApp names it.
    """
    named = str(node_config.get("client-dir", "")) or config.train.client_dir
    if not named and (node_config.get(SIMULATED) or simulated_clients_at_once()):
        named = simulated
    return Path(named).expanduser() if named else flower_home() / "flower-split" / FOLDER


@dataclass(frozen=True, slots=True)
class PrivateFolder:
    """What one client keeps of one run.

    Args:
        path: Its directory; made by the first :meth:`write`.
    """

    path: Path

    @classmethod
    def of(cls, client_dir: Path, experiment: str, partition_id: int) -> "PrivateFolder":
        """Return the folder of a run's partition under a client's directory."""
        run = "run-" + quote(experiment, safe=" ")  # names no other directory, whatever it holds
        return cls(client_dir / run / f"partition-{partition_id}")

    def read(self, digest: str) -> dict[str, Tensor]:
        """Return the factors of that digest, sorted by name.

        Raises:
            RunDirectoryError: They are not there, damaged, or of another format.
        """
        path, content = self._found(digest)
        if problem := _FORMAT.problem(path, self._origin(content)[1]):
            raise RunDirectoryError(problem)
        try:
            return tensors_from(content)
        except ValueError as error:
            raise _damaged(self.path, error) from error

    def write(self, state: Mapping[str, Tensor], *, server_round: int, base: str) -> str:
        """Keep a round's factors, beside those that it began with and the ones before.

        Args:
            state: By tensor name.
            server_round: The round that trained them.
            base: Digest of the factors that the round began with; empty: the initial ones.

        Returns:
            Their digest: 64 hexadecimal digits that depend on the values, the round and the base.

        Raises:
            FederationError: They hold NaN or Inf.
            RunDirectoryError: The disk is full or fails.
        """
        for name, value in state.items():
            if not bool(torch.isfinite(value).all()):
                raise FederationError(
                    f"round {server_round}: training gave NaN or Inf in {name}, which stays with this "
                    "client. Lower train.optimizer.learning-rate, or look at its data."
                )
        tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
        # One entry, for safetensors writes several in no certain order.
        content = save(tensors, metadata={_ORIGIN: f"{server_round} {base} {_FORMAT.number}"})
        digest = hashlib.sha256(content).hexdigest()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._prune(server_round, base)
            write_atomically(self.path / f"round-{server_round}.{digest}.safetensors", content)
        except OSError as error:
            raise RunDirectoryError(
                f"round {server_round}: this client's own factors cannot be written to {self.path} "
                f"({os.strerror(error.errno or 0)}). Free space, or set another directory by "
                "train.client-dir or the node config's client-dir."
            ) from error
        return digest

    def _found(self, digest: str) -> tuple[Path, bytes]:
        paths = list(self.path.glob(f"round-*.{checked_digest(digest)}.safetensors"))
        try:
            content = paths[0].read_bytes()
        except (IndexError, OSError) as error:
            raise RunDirectoryError(
                f"this client's own factors of its last committed round (digest {digest[:16]}) are "
                f"not in {self.path}. Restore that directory, or set train.client-dir or the node "
                "config's client-dir to where the client kept them."
            ) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise RunDirectoryError(
                f"{paths[0]} is damaged: its SHA-256 is not the one in its name. Restore the file, or "
                "go back to the round before with resume-previous = true."
            )
        return paths[0], content

    def _origin(self, content: bytes) -> tuple[str, int]:
        """Read from a file's header what its round began with, and its format: 8 bytes of length, JSON.

        Raises:
            RunDirectoryError: It does not say so.
        """
        length = int.from_bytes(content[:8], "little")
        try:
            named = read_json_object(content[8 : 8 + length]).get("__metadata__")
            if not isinstance(named, dict) or _ORIGIN not in named:
                raise ValueError("its header does not name what the round began with")
            words = str(named[_ORIGIN]).split(" ")
            if len(words) not in (2, 3):
                raise ValueError(f"what the round began with has {len(words)} words, not 2 or 3")
            return words[1], int(words[2]) if len(words) == 3 else 0
        except ValueError as error:
            raise _damaged(self.path, error) from error

    def _prune(self, server_round: int, base: str) -> None:
        """Leave of earlier rounds only ``base`` and the factors that its own round began with."""
        keep = {base, self._origin(self._found(base)[1])[0]} if base else set()
        for path in self.path.iterdir():
            found = _FILE.fullmatch(path.name)
            if found is None or int(found["round"]) >= server_round:
                continue
            if found["digest"] not in keep or path.name.endswith(".tmp"):
                path.unlink(missing_ok=True)


def private_state(digests: Mapping[int, str]) -> dict[str, Tensor]:
    """Return the server's record, slot → digest of the last committed round, as tensors."""
    return {
        f"{_STATE}{slot}": torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
        for slot, digest in sorted(digests.items())
    }


def digests_of(state: Mapping[str, Tensor]) -> dict[int, str]:
    """Read what :func:`private_state` wrote; other tensors in ``state`` are passed over.

    Raises:
        RunDirectoryError: One of its tensors is no digest of a slot.
    """
    found: dict[int, str] = {}
    for name, tensor in state.items():
        if name.startswith(_STATE):
            slot = name.removeprefix(_STATE)
            whole = tensor.dtype == torch.uint8 and tuple(tensor.shape) == (_DIGEST_BYTES,)
            if not (slot.isdecimal() and slot.isascii() and len(slot) < 20 and whole):
                raise RunDirectoryError(
                    f"the strategy's state has a tensor {name[:80]!r}, {tensor.dtype} "
                    f"{list(tensor.shape)}, which is no digest of a client's private factors. Go back "
                    "to the round before with resume-previous = true."
                )
            found[int(slot)] = bytes(tensor.tolist()).hex()
    return found


def checked_digest(digest: str) -> str:
    """Return a digest that may be part of a file's name.

    Raises:
        FederationError: It is none.
    """
    if not _DIGEST.fullmatch(digest):
        raise FederationError(
            f"a digest of private factors must be 64 hexadecimal digits; it is {digest[:80]!r}. Run "
            "the same version of flower_split on every machine."
        )
    return digest


def _damaged(path: Path, error: ValueError) -> RunDirectoryError:
    return RunDirectoryError(
        f"the private factors in {path} are damaged: {error}. Restore the file, or go back to the "
        "round before with resume-previous = true."
    )
