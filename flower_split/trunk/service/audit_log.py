"""The audit log: who asked the trunk for what, and what came of it, as JSON lines in a hash chain.

Every line carries the hash of the line before it, so a line that is changed, taken out or put in
shows (:func:`verify_audit_log`); lines cut off at the end show only beside a hash noted elsewhere.
A file that is moved away is followed by a new one that goes on with the chain. No line holds tensors,
tokens, session ids in full, or texts that a peer wrote beyond names it chose in a key.
"""

import errno
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from google.protobuf.message import Message

from flower_split.errors import CodecError, ConfigError, DataError, TrunkRefused
from flower_split.runtime.closing import Closing
from flower_split.runtime.json_text import read_json_object
from flower_split.runtime.secret_files import PRIVATE_FILE
from flower_split.trunk.compute.checks import printable

logger = logging.getLogger(__name__)

START = "0" * 64  # what the first line of a chain says of the line before it
_QUIET_SECONDS = 1.0  # between two lines of refused calls: a flood of calls is no flood of lines
# What is told of a call's header, and how many characters of it.
_NAMES = {
    "session": 8,
    "experiment": 40,
    "server_round": 20,
    "attempt": 20,
    "window": 20,
    "micro_batch": 20,
    "planned_steps": 20,
    "slots": 80,
    "subject": 64,
}
_TAIL_BYTES = 1 << 16  # enough for the last line


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One call, as the log tells it."""

    peer: str  # address
    subject: str  # the first digits of its token's SHA-256; empty: it has none
    rpc: str
    certificate: str = ""  # its common name; empty: it showed none
    key: str = ""  # round, attempt, window, micro-batch, as the call names them
    digest: str = ""  # of what arrived, hex
    outcome: str = "OK"  # or REFUSED, FAILED
    reason: str = ""  # of a refusal, typed


@dataclass(frozen=True, slots=True)
class Told:
    """What a call tells of itself."""

    peer: str  # address
    token: str | None
    method: str
    header: Message | None  # None: it was not read
    digest: bytes  # of what arrived
    certificate: str = ""  # its common name


def event_of(call: Told, error: BaseException | None, experiment: str = "") -> Event:
    """Return how a call ended; its token is told by its hash alone, which tells clients apart.

    Args:
        call: The call.
        error: What it ended with; None: its answer.
        experiment: The experiment, of several, whose client called; empty: there is one.
    """
    reason = reason_of(error)
    key = "" if call.header is None else _key_text(call.header)
    if experiment and "experiment=" not in key:
        key = f"experiment={printable(experiment)[: _NAMES['experiment']]} {key}".strip()
    return Event(
        peer=call.peer,
        # Tokens are random, so that nobody finds one by its hash.
        subject="" if call.token is None else hashlib.sha256(call.token.encode()).hexdigest()[:12],
        rpc=call.method,
        certificate=printable(call.certificate)[:64],
        key=key,
        digest=call.digest.hex(),
        outcome="OK" if error is None else "REFUSED" if reason else "FAILED",
        reason=reason or ("" if error is None else type(error).__name__),
    )


def reason_of(error: BaseException | None) -> str:
    """Return why a call was refused, typed; empty: it was not, or through no fault of its caller."""
    if isinstance(error, TrunkRefused):
        return error.reason.name
    return "MALFORMED" if isinstance(error, CodecError) else ""


def _key_text(header: Message) -> str:
    """Return the names in a call: of its round, its contribution, and the beginning of its session."""
    named = {field.name: value for field, value in header.ListFields()}
    if isinstance(key := named.get("key"), Message):
        named |= {field.name: value for field, value in key.ListFields()}
    texts = [
        f"{name}={printable(str(named[name]))[:longest]}"
        for name, longest in _NAMES.items()
        if name in named
    ]
    return " ".join(texts)


class AuditLog(Closing):
    """Appends events to a file. Thread-safe: a lock of its own, under which nothing else is locked.

    Args:
        path: The file; one that is there is gone on with.

    Raises:
        ConfigError: The file cannot be written, or its end is no line of such a log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._next_refusal = -float("inf")
        self._unwritten = 0  # refused calls since the last line of one
        self._failed = 0  # lines that could not be written since the last one that was
        self._closed = False
        try:
            self._number, self._last = _end_of(path)
            self._file = _opened(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--audit-log {path} cannot be continued ({error}). Name a file that this user may "
                "write; move one aside that is damaged, and keep it."
            ) from error

    def note(self, event: Event) -> None:
        """Append an event; of refused calls one a second, with the number of those left out.

        A line that cannot be written (a full disk) does not fail the call: the log of the trunk says
        so, and the next line that can be written says how many calls have none.
        """
        with self._lock:
            refused = event.outcome == "REFUSED"
            if refused and time.monotonic() < self._next_refusal:
                self._unwritten += 1
                return
            if refused:
                self._next_refusal = time.monotonic() + _QUIET_SECONDS
            self._append_or_count(event, told=refused)

    def close(self) -> None:
        """Write how many calls have no line, and close the file. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._append_or_count(Event(peer="", subject="trunk", rpc="close"), told=True)
            os.close(self._file)
            self._closed = True
            logger.info("audit log ends at line %d, %s", self._number, self._last)

    def _append_or_count(self, event: Event, *, told: bool) -> None:
        """Append a line; with ``told``, or after lines that failed, say how many calls have none."""
        fields = asdict(event) | {
            "also_refused": self._unwritten if told else 0,
            "not_written": self._failed,
        }
        try:
            self._append(fields)
        except OSError as error:
            if not self._failed:
                logger.error("the audit log %s cannot be written: %s", self._path, error)
            self._failed += 1
            return
        self._failed = 0
        if told:
            self._unwritten = 0

    def _append(self, fields: dict[str, object]) -> None:
        """Write one whole line, or none.

        Raises:
            OSError: It cannot be written.
        """
        if not self._path.exists() or os.fstat(self._file).st_ino != self._path.stat().st_ino:
            moved, self._file = self._file, _opened(self._path)  # the chain goes on in a new file
            os.close(moved)
        utc = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"number": self._number + 1, "utc": utc, **fields, "previous": self._last}
        digest = _hash_of(record)
        line = (json.dumps({**record, "hash": digest}) + "\n").encode()
        end = os.fstat(self._file).st_size
        written = os.write(self._file, line)
        if written < len(line):
            os.ftruncate(self._file, end)
            raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes found room")
        self._number, self._last = self._number + 1, digest


def verify_audit_log(paths: Sequence[Path]) -> tuple[int, str]:
    """Check files of one log, oldest first; return the number and hash of the last line.

    Raises:
        DataError: A line is damaged, missing, or out of its place; names file and line.
    """
    number, last = None, None
    for path, line, text in _lines(paths):
        try:
            record = read_json_object(text)
            digest, given, previous = _links_of(record)
        except ValueError as error:
            raise DataError(f"{path}, line {line} is no line of an audit log: {error}.") from error
        if digest != _hash_of(record):
            raise DataError(f"{path}, line {line}: the line was changed after it was written.")
        if number is not None and (given, previous) != (number + 1, last):
            raise DataError(
                f"{path}, line {line}: event {given} does not follow event {number}: lines were taken "
                "out or put in, or the files are not given oldest first."
            )
        if given == 1 and previous != START:
            raise DataError(f"{path}, line {line}: the chain does not begin where it should.")
        number, last = given, digest
    if number is None or last is None:
        raise DataError(f"{', '.join(str(path) for path in paths)}: there are no lines.")
    return number, last


def _lines(paths: Sequence[Path]) -> Iterator[tuple[Path, int, str]]:
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                for line, text in enumerate(file, 1):
                    yield path, line, text
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}.") from error


def _hash_of(record: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE_FILE)


def _end_of(path: Path) -> tuple[int, str]:
    """Return number and hash of a file's last line; where there is none, of the chain's beginning."""
    if not path.exists() or path.stat().st_size == 0:
        return 0, START
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        tail = file.read()
    if not tail.endswith(b"\n"):
        raise ValueError("its last line is cut off")
    record = read_json_object(tail.splitlines()[-1])
    digest, number, _ = _links_of(record)
    if digest != _hash_of(record):
        raise ValueError("its last line was changed")
    return number, digest


def _links_of(record: dict[str, object]) -> tuple[str, int, str]:
    """Take the hash out of a line; return it, the line's number, and the hash before it.

    Raises:
        ValueError: One of them is missing, or of another type.
    """
    digest, number, previous = (
        record.pop("hash", None),
        record.get("number"),
        record.get("previous"),
    )
    if not (isinstance(digest, str) and type(number) is int and isinstance(previous, str)):
        raise ValueError("it has not the hash, the number and the hash before that every line has")
    return digest, number, previous
