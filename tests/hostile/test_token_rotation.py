"""The coordinator's token is changed while trunk and run go on; a deleted file makes no other one."""

from contextlib import closing
from pathlib import Path

import pytest

from flower_split.errors import ConfigError, RefusalReason, TrunkRefused
from flower_split.runtime.secret_files import TokenFile, read_secret
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.trunk_connection import coordinator_token
from flower_split.trunk.service.server import TrunkServer
from tests.support.certificates import renew
from tests.support.loopback import FakeEngine

OLD, NEW = "the former token, long enough", "the token that replaces it"


def write(path: Path, *tokens: str) -> Path:
    path.write_text("".join(f"{token}\n" for token in tokens))
    path.chmod(0o600)
    renew((str(path),))
    return path


def link(port: int, token: str | TokenFile) -> closing[TrunkCoordinator]:
    return closing(TrunkCoordinator(f"127.0.0.1:{port}", token, timeout=20.0))


def refused(port: int, token: str) -> bool:
    """Whether the trunk does not know a token, on a connection of its own."""
    with link(port, token) as one:
        try:
            one.status()
        except TrunkRefused as error:
            assert error.reason is RefusalReason.UNAUTHENTICATED
            return True
    return False


def test_token_is_changed_in_three_steps_and_no_call_is_refused(tmp_path: Path) -> None:
    at_trunk, at_server = write(tmp_path / "trunk", OLD), write(tmp_path / "server", OLD)
    engine = FakeEngine()
    server = TrunkServer(engine, coordinator_token=TokenFile(at_trunk, "--token-file"))
    port = server.start()
    try:
        with link(port, TokenFile(at_server, "trunk.token-file")) as running:
            assert running.status().version == 10
            assert refused(port, NEW)
            write(at_trunk, NEW, OLD)
            assert running.status().version == 10 and not refused(port, NEW)
            write(at_server, NEW)
            assert running.status().version == 10 and not refused(port, OLD)
            write(at_trunk, NEW)
            assert running.status().version == 10 and refused(port, OLD)
    finally:
        server.stop(0.0)
        engine.close()


@pytest.mark.parametrize("problem", ["deleted", "empty", "short", "open to others"])
def test_file_that_cannot_be_used_any_more_leaves_the_token_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, problem: str
) -> None:
    path = write(tmp_path / "token", OLD)
    file = TokenFile(path, "--token-file")
    if problem == "deleted":
        path.unlink()
    else:
        write(path, *{"empty": (), "short": ("short",)}.get(problem, (NEW,)))
        path.chmod(0o644 if problem == "open to others" else 0o600)
    assert file.tokens() == file.tokens() == (OLD,)
    said = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1 and OLD not in said[0].getMessage() and NEW not in said[0].getMessage()
    assert path.exists() == (problem != "deleted")  # nothing is made in its place
    write(path, NEW)
    assert file.tokens() == (NEW,)


def test_file_that_is_not_there_or_short_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--token-file: .* is not there"):
        TokenFile(tmp_path / "none", "--token-file")
    with pytest.raises(ConfigError, match="at least 16 characters; it has 5"):
        TokenFile(write(tmp_path / "short", "short"), "--token-file")


def test_callers_show_the_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "token", NEW, OLD)
    callers = coordinator_token(str(path), {})
    assert isinstance(callers, TokenFile)
    assert read_secret(path, "--token-file") == callers.tokens()[0] == NEW
