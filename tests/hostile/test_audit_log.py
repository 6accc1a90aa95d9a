"""The audit log tells every call, and shows every line that was touched."""

import hashlib
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flower_split.cli.main import main
from flower_split.errors import ConfigError, DataError, TrunkRefused
from flower_split.trunk.service.audit_log import START, AuditLog, Event, verify_audit_log
from tests.support.loopback import (
    COORDINATOR_TOKEN,
    HIDDEN,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)


def event(number: int) -> Event:
    return Event(peer="ipv4:10.0.0.7:5", subject="ab", rpc="Forward", key=f"micro_batch={number}")


def written(path: Path, count: int) -> list[dict[str, object]]:
    with AuditLog(path) as log:
        for number in range(count):
            log.note(event(number))
    return records(path)


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_carries_the_hash_of_the_line_before(tmp_path: Path) -> None:
    found = written(tmp_path / "audit", 3)  # and the line that closes it
    assert [item["previous"] for item in found] == [START, *(item["hash"] for item in found[:-1])]
    for item in found:  # by hand: SHA-256 of the line's other fields, sorted
        digest = item.pop("hash")
        assert hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest() == digest
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o600


@contextmanager
def full_after(path: Path, num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond the size of ``path`` and ``num_bytes``, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 10])  # none; and for the beginning of a line
def test_line_that_finds_no_room_fails_no_call_and_is_counted_in_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    path = tmp_path / "audit"
    with AuditLog(path) as log:
        log.note(event(0))
        with full_after(path, room):
            log.note(event(1))
            log.note(event(2))
        log.note(event(3))
    assert [item["key"] for item in records(path)] == ["micro_batch=0", "micro_batch=3", ""]
    assert [item["not_written"] for item in records(path)] == [0, 2, 0]
    assert verify_audit_log([path])[0] == 3
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and str(path) in errors[0]


def changed(lines: list[str]) -> list[str]:
    return [lines[0], lines[1].replace("micro_batch=1", "micro_batch=7"), *lines[2:]]


def rehashed(lines: list[str]) -> list[str]:
    """As :func:`changed`, by somebody who knows how a line's own hash is made."""
    record = json.loads(changed(lines)[1])
    del record["hash"]
    record["hash"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return [lines[0], json.dumps(record), *lines[2:]]


@pytest.mark.parametrize(
    "attack",
    [
        changed,
        rehashed,
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[0], *lines[1:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [lines[0], "{}", *lines[1:]],
        lambda lines: [lines[0], lines[1][:-20], *lines[2:]],
        lambda lines: [],
    ],
    ids=["changed", "rehashed", "removed", "doubled", "swapped", "put-in", "cut", "emptied"],
)
def test_line_that_was_touched_shows(
    tmp_path: Path, attack: Callable[[list[str]], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "audit"
    written(path, 4)
    assert main(["audit-log", "verify", str(path)]) == 0
    assert capsys.readouterr().out.startswith("unbroken up to event 5, hash ")
    path.write_text("".join(line + "\n" for line in attack(path.read_text().splitlines())))
    with pytest.raises(DataError, match=str(path)):
        verify_audit_log([path])


def test_chain_goes_on_after_a_restart_and_in_a_new_file_after_rotation(tmp_path: Path) -> None:
    path, old = tmp_path / "audit", tmp_path / "audit.1"
    written(path, 2)
    with AuditLog(path) as log:
        log.note(event(2))
        path.rename(old)
        log.note(event(3))
    assert verify_audit_log([old, path])[0] == 6  # four events, and two ends
    assert len(records(path)) == 2
    with pytest.raises(DataError, match="oldest first"):
        verify_audit_log([path, old])


def test_damaged_end_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    written(path, 1)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ConfigError, match="--audit-log .* cut off"):
        AuditLog(path)


def test_flood_of_refused_calls_leaves_one_line_and_their_number(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit") as log:
        for _ in range(90):
            log.note(Event(peer="p", subject="", rpc="Status", outcome="REFUSED", reason="R"))
    refused, end = records(tmp_path / "audit")
    assert (refused["rpc"], refused["also_refused"]) == ("Status", 0)
    assert (end["rpc"], end["also_refused"]) == ("close", 89)


def test_calls_over_the_wire_are_told_without_secrets(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    with AuditLog(path) as log, served(make_engine(TinyTrunk()), audit=log) as port:
        with coordinator(port) as control, remote(port) as client:
            control.begin_round(plan())
            session = client.open(1).session
            with client.micro_batch(0, 0, num_tokens=2, loss_denominator=2.0, last=True):
                client(torch.full((1, 2, HIDDEN), 0.123456789)).sum().backward()
            with coordinator(port, token="a wrong token") as stranger:
                with pytest.raises(TrunkRefused):
                    stranger.status()
    verify_audit_log([path])
    found = {item["rpc"]: item for item in records(path)}
    calls = ["BeginRound", "OpenSession", "Forward", "Backward", "Status", "CloseSession"]
    assert list(found) == [*calls, "close"]
    forward = found["Forward"]
    assert forward["outcome"] == "OK" and len(str(forward["digest"])) == 32
    expected = f"session={session[:8]} experiment=e server_round=1"
    assert forward["key"] == expected  # attempt, window and micro-batch 0 are not in the message
    assert forward["subject"] == found["OpenSession"]["subject"] != found["BeginRound"]["subject"]
    assert (found["Status"]["outcome"], found["Status"]["reason"]) == ("REFUSED", "UNAUTHENTICATED")
    text = path.read_text()
    for secret in (COORDINATOR_TOKEN, "token-0", "a wrong token", session, "0.1234"):
        assert secret not in text
