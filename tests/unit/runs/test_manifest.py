"""The ServerApp's checkpoints: a crash anywhere leaves the round before, or the round."""

import json
from pathlib import Path

import pytest
import torch

from flower_split.errors import RunDirectoryError
from flower_split.runs.manifest import RunCheckpoints
from flower_split.runtime import failpoints


def commit(checkpoints: RunCheckpoints, server_round: int, **changes) -> None:
    shared = torch.full((3,), float(server_round))
    values = {
        "experiment": "e",
        "server_round": server_round,
        "attempt": 0,
        "trunk_digest": f"digest-{server_round}",
        "trunk_version": 2 * server_round,
        "adapter": {"a": torch.arange(4.0) + server_round},
        "strategy": {"m": shared, "same memory": shared},
    }
    checkpoints.commit(**{**values, **changes})


def latest_round(directory: Path, **options) -> int:
    resumed = RunCheckpoints(directory).latest(**options)
    assert resumed is not None
    number = resumed.entry.server_round
    assert torch.equal(resumed.adapter["a"], torch.arange(4.0) + number)
    assert torch.equal(resumed.strategy["m"], torch.full((3,), float(number)))
    assert resumed.entry.trunk_digest == f"digest-{number}"
    return number


@pytest.fixture
def two_rounds(tmp_path):
    checkpoints = RunCheckpoints(tmp_path)
    for server_round in (0, 1, 2):
        commit(checkpoints, server_round)
    return checkpoints


def test_nothing_committed_is_none(tmp_path):
    assert RunCheckpoints(tmp_path / "not there").latest() is None


def test_latest_and_previous_round(two_rounds):
    assert latest_round(two_rounds.directory) == 2
    assert latest_round(two_rounds.directory, previous=True) == 1


def test_round_committed_again_after_previous_replaces_it(two_rounds):
    commit(two_rounds, 2, attempt=1)
    assert RunCheckpoints(two_rounds.directory).latest().entry.attempt == 1
    assert latest_round(two_rounds.directory, previous=True) == 1


def test_files_of_old_rounds_are_removed(two_rounds):
    for server_round in range(3, 8):
        commit(two_rounds, server_round)
    assert len(list(two_rounds.directory.glob("server-*.safetensors"))) <= 3


# A commit writes three files: the adapter, MANIFEST.previous, MANIFEST.
@pytest.mark.parametrize(
    ("place", "hit", "committed"),
    [
        ("server.commit.before", 1, False),
        ("file.write.half", 1, False),
        ("file.write.before-rename", 1, False),
        ("file.write.after-rename", 1, False),
        ("server.commit.tensors-written", 1, False),
        ("file.write.half", 2, False),
        ("file.write.after-rename", 2, False),
        ("file.write.half", 3, False),
        ("file.write.before-rename", 3, False),
        ("file.write.after-rename", 3, True),
        ("server.commit.manifest-written", 1, True),
    ],
)
def test_crash_at_every_step_of_the_commit_leaves_one_of_both_rounds(
    two_rounds, place, hit, committed
):
    failpoints.switch_on(place, "raise", at=hit)
    with pytest.raises((OSError, RunDirectoryError)):
        commit(two_rounds, 3)
    assert failpoints.fired() == {place}
    failpoints.reset()
    assert latest_round(two_rounds.directory) == (3 if committed else 2)
    commit(two_rounds, 3)
    commit(two_rounds, 4)
    assert latest_round(two_rounds.directory) == 4
    assert not list(two_rounds.directory.glob("*.tmp"))


@pytest.mark.parametrize("hit", [1, 2, 3])
def test_full_disk_is_told_and_leaves_the_round_before(two_rounds, hit):
    failpoints.switch_on("file.write.half", "enospc", at=hit)
    with pytest.raises(RunDirectoryError, match="round 3 cannot be committed.*No space left"):
        commit(two_rounds, 3)
    assert failpoints.fired() == {"file.write.half"}
    assert latest_round(two_rounds.directory) == 2


@pytest.mark.parametrize("name", ["MANIFEST", "server-2.*.safetensors"])
@pytest.mark.parametrize("damage", ["torn", "bit-flipped"])
def test_damaged_file_is_named_and_the_round_before_is_used_on_request(two_rounds, name, damage):
    (path,) = two_rounds.directory.glob(name)
    content = bytearray(path.read_bytes())
    if damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2 if name == "MANIFEST" else -1] ^= 4
        path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match="damaged.*resume-previous") as info:
        two_rounds.latest()
    assert str(path) in str(info.value)
    assert latest_round(two_rounds.directory, previous=True) == 1


def test_changed_manifest_is_noticed(two_rounds):
    path = two_rounds.directory / "MANIFEST"
    manifest = json.loads(path.read_text())
    manifest["rounds"][-1]["trunk_digest"] = "another"
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunDirectoryError, match="MANIFEST is damaged"):
        two_rounds.latest()


def test_previous_of_a_run_with_one_round_is_told(tmp_path):
    commit(RunCheckpoints(tmp_path), 0)
    with pytest.raises(RunDirectoryError, match="no round before"):
        RunCheckpoints(tmp_path).latest(previous=True)


def test_manifest_says_its_format(two_rounds):
    assert json.loads((two_rounds.directory / "MANIFEST").read_text())["format"] == 1


def test_manifest_from_before_formats_had_numbers_is_read(two_rounds):
    path = two_rounds.directory / "MANIFEST"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({"rounds": manifest["rounds"], "sha256": manifest["sha256"]}))
    assert latest_round(two_rounds.directory) == 2


@pytest.mark.parametrize("previous", [False, True])
def test_manifest_of_a_newer_format_is_refused_with_both_numbers(two_rounds, previous):
    path = two_rounds.directory / "MANIFEST"
    path.write_text(json.dumps({"format": 3, "rounds": "of another form"}))
    with pytest.raises(RunDirectoryError, match="format 3, .*format 0 to 1: newer.*Upgrade"):
        two_rounds.latest(previous=previous)
    with pytest.raises(RunDirectoryError, match="format 3"):
        commit(two_rounds, 3)
    assert json.loads(path.read_text())["format"] == 3  # not written over
