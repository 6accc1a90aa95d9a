"""``flower-split trunk-release``: a trunk is freed from a run that has gone."""

from pathlib import Path

import pytest

from flower_split.cli.main import main
from flower_split.errors import TrunkRefused
from tests.support.loopback import (
    COORDINATOR_TOKEN,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)


@pytest.fixture
def token(tmp_path: Path) -> str:
    file = tmp_path / "token"
    file.write_text(COORDINATOR_TOKEN)
    file.chmod(0o600)
    return str(file)


def test_trunk_of_a_run_that_has_gone_is_free_for_another(
    token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(make_engine(TinyTrunk())) as port, coordinator(port) as link:
        address = f"127.0.0.1:{port}"
        link.begin_round(plan(1))
        other = plan(1, experiment="another")
        with pytest.raises(TrunkRefused, match="trunk-release"):
            link.begin_round(other)
        assert main(["trunk-release", address, "--token-file", token]) == 0
        assert "was given up" in capsys.readouterr().out
        link.begin_round(other)
        assert link.status().experiment == "another"
        link.abort_round(other.experiment, other.server_round, other.attempt, "done")
        assert main(["trunk-release", address, "--token-file", token]) == 0
        assert "no round is open" in capsys.readouterr().out


def test_trunk_whose_clients_are_at_work_is_released_by_force_alone(
    token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(make_engine(TinyTrunk())) as port, coordinator(port) as link:
        link.begin_round(plan(2))
        with remote(port) as client:
            client.open(planned_steps=1)
            options = [f"127.0.0.1:{port}", "--token-file", token]
            assert main(["trunk-release", *options]) == 1
            assert "--force" in capsys.readouterr().err and link.status().phase == "joining"
            assert main(["trunk-release", *options, "--force"]) == 0
            assert link.status().phase == "aborted"
            assert "operator released" in link.status().problem
