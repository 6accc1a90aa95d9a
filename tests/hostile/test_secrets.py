"""A file that holds a secret is its owner's: a looser one is refused, and none is made looser."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from flower_split.cli.trunk import token_from
from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.runs.directory import RunDirectory
from flower_split.runtime.atomic_files import write_atomically
from flower_split.runtime.secret_files import read_secret
from flower_split.server.trunk_connection import coordinator_token
from flower_split.trunk.service.server import TrunkServer
from tests.support.loopback import FakeEngine
from tests.unit.trunk.test_trunk_server import self_signed

TOKEN = "a token of enough characters"


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=["umask-000", "umask-022", "umask-077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def secret(folder: Path, permissions: int) -> Path:
    path = folder / "token"
    path.write_text(TOKEN)
    path.chmod(permissions)
    return path


@pytest.mark.parametrize("permissions", [0o666, 0o644, 0o604, 0o620, 0o602, 0o601])
def test_token_file_that_others_can_use_is_refused_with_the_remedy(
    tmp_path: Path, permissions: int
) -> None:
    path = secret(tmp_path, permissions)
    remedy = f"mode {permissions:04o} .*chmod 600 {path}"
    for read in (token_from, lambda file: coordinator_token(str(file), {})):
        with pytest.raises(ConfigError, match=remedy) as refused:
            read(path)
        assert TOKEN not in str(refused.value)


@pytest.mark.parametrize("permissions", [0o600, 0o400, 0o440, 0o640])
def test_token_file_of_its_owner_or_mounted_for_a_group_is_read(
    tmp_path: Path, permissions: int
) -> None:
    assert read_secret(secret(tmp_path, permissions), "trunk.token-file") == TOKEN


def test_private_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match=f"tls-key: .*chmod 600 {key}"):
        TrunkServer(
            FakeEngine(), coordinator_token="t", tls_certificate=str(certificate), tls_key=str(key)
        )


def test_deleted_token_file_of_a_trunk_with_checkpoints_is_an_error(tmp_path: Path) -> None:
    checkpoints, path = tmp_path / "checkpoints", tmp_path / "token"
    token = token_from(path, str(checkpoints))  # the first start: nothing is there
    checkpoints.mkdir()
    assert token_from(path, str(checkpoints)) == token
    (checkpoints / "experiment").mkdir()
    path.unlink()
    with pytest.raises(ConfigError, match="Put the file back"):
        token_from(path, str(checkpoints))
    assert not path.exists()


def test_files_and_directories_of_a_run_are_their_owners_whatever_the_umask(
    tmp_path: Path, umask: int
) -> None:
    write_atomically(tmp_path / "weights", b"content")
    assert mode(tmp_path / "weights") == 0o600
    run = tmp_path / "run"
    RunDirectory.create(RunConfig(run_dir=str(run)))
    assert mode(run) == 0o700
    assert token_from(tmp_path / "token") and mode(tmp_path / "token") == 0o600
