"""Targets of files that a trunk, a run and a client read back.

Hashes that a file must have of another one stand in an input as words in braces, and are put in their
place: behind a wrong hash nothing else is read.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from flower_split.errors import ConfigError, DataError, RunDirectoryError, TrunkRefused
from flower_split.runs.directory import RunDirectory
from flower_split.runs.manifest import RunCheckpoints
from flower_split.runs.private_factors import PrivateFolder, digests_of
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.service.audit_log import AuditLog, verify_audit_log
from tests.hostile.targets.target import Target, parts_of

TENSORS_SHA256 = b"{tensors}"  # stands for the hash of an input's tensors
ROUNDS_SHA256 = b"{rounds}"  # ... of a manifest's rounds
ADAPTER_FILE = "server-1.safetensors"
TRUNK_FILE = "trunk-1.0.safetensors"
EXPERIMENT = "fuzz"
DIGEST = "0" * 64
RUN_FILES = ("config.json", "metrics.jsonl", "adapters/client.safetensors", "summary.json")


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder in memory where there is one: a fuzzer writes a thousand files a second."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


def _emptied(folder: Path) -> Path:
    for path in folder.iterdir():
        path.unlink()
    return folder


def _three(data: bytes) -> tuple[bytes, bytes, bytes]:
    first, second, third, *_ = [*parts_of(data), b"", b"", b""]
    return first, second, third


def _with_rounds_hash(text: bytes) -> bytes:
    """Put the hash of a manifest's rounds where it is asked for, if they can be read."""
    try:
        rounds = json.dumps(json.loads(text)["rounds"], sort_keys=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        return text
    return text.replace(ROUNDS_SHA256, hashlib.sha256(rounds.encode()).hexdigest().encode())


@contextmanager
def manifest() -> Iterator[Callable[[bytes], None]]:
    """MANIFEST, the tensors that it names, and MANIFEST.previous."""
    with _folder() as folder:
        checkpoints = RunCheckpoints(folder)

        def run(data: bytes) -> None:
            text, tensors, before = _three(data)
            _emptied(folder)
            sha256 = hashlib.sha256(tensors).hexdigest().encode()
            for name, content in (("MANIFEST", text), ("MANIFEST.previous", before)):
                content = _with_rounds_hash(content.replace(TENSORS_SHA256, sha256))
                (folder / name).write_bytes(content)
            (folder / ADAPTER_FILE).write_bytes(tensors)
            errors = []
            for previous in (False, True):
                try:
                    resumed = checkpoints.latest(previous=previous)
                    if resumed is not None:
                        digests_of(resumed.strategy)
                except RunDirectoryError as error:
                    errors.append(error)
            if errors:
                raise errors[0]

        yield run


@contextmanager
def checkpoint() -> Iterator[Callable[[bytes], None]]:
    """``trunk-1.json`` and the tensors that it names; then what an old round's clearing does with them."""
    with _folder() as directory:
        store = CheckpointStore(directory)
        folder = directory / f"trunk-{EXPERIMENT}"
        folder.mkdir()

        def run(data: bytes) -> None:
            text, tensors, _ = _three(data)
            _emptied(folder)
            sha256 = hashlib.sha256(tensors).hexdigest().encode()
            (folder / "trunk-1.json").write_bytes(text.replace(TENSORS_SHA256, sha256))
            (folder / TRUNK_FILE).write_bytes(tensors)
            try:
                store.load(EXPERIMENT, 1, DIGEST)
            finally:
                store.discard_after(EXPERIMENT, 1)
                store.prune(EXPERIMENT, 4)

        yield run


@contextmanager
def run_directory() -> Iterator[Callable[[bytes], None]]:
    """One file of a run's directory: which, then its content."""
    with _folder() as folder:
        (folder / "adapters").mkdir()
        config = Path(folder / "config.json")

        def run(data: bytes) -> None:
            name = RUN_FILES[data[0] % len(RUN_FILES)] if data else RUN_FILES[0]
            config.write_text("{}")
            (folder / name).write_bytes(data[1:])
            opened = RunDirectory.open(folder)
            if name == "metrics.jsonl":
                opened.metrics()
            elif name == "summary.json":
                opened.summary()
            elif name != "config.json":
                opened.read_adapter("client")

        yield run


@contextmanager
def private_factors() -> Iterator[Callable[[bytes], None]]:
    """A client's own factors of a round, read as its next round does, with its clearing."""
    with _folder() as folder:
        private = PrivateFolder(folder)
        tensors = {"b": torch.ones(1)}

        def run(data: bytes) -> None:
            _emptied(folder)
            digest = hashlib.sha256(data).hexdigest()
            (folder / f"round-1.{digest}.safetensors").write_bytes(data)
            try:
                private.read(digest)
            finally:
                private.write(tensors, server_round=2, base=digest)

        yield run


@contextmanager
def audit_log() -> Iterator[Callable[[bytes], None]]:
    """An audit log: verified, and gone on with."""
    with _folder() as folder:
        path = folder / "audit.jsonl"

        def run(data: bytes) -> None:
            path.write_bytes(data)
            try:
                verify_audit_log([path])
            finally:
                AuditLog(path).close()

        yield run


MANIFEST = Target("manifest", (RunDirectoryError,), manifest)
CHECKPOINT = Target("checkpoint", (TrunkRefused,), checkpoint)
RUN_DIRECTORY = Target("run-directory", (RunDirectoryError,), run_directory)
PRIVATE_FACTORS = Target("private-factors", (RunDirectoryError,), private_factors)
AUDIT_LOG = Target("audit-log", (DataError, ConfigError), audit_log)
