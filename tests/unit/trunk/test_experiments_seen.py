"""What an operator sees of several experiments: status, release, figures and the audit log."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from flower_split.cli.main import main
from flower_split.errors import ConfigError
from flower_split.trunk.serve import Serving
from flower_split.trunk.service.audit_log import AuditLog, verify_audit_log
from flower_split.trunk.service.server import TrunkServer
from tests.support.loopback import COORDINATOR_TOKEN
from tests.unit.trunk.test_experiments import Rig, coordinator, join, plan, train


@pytest.fixture
def token(tmp_path: Path) -> str:
    file = tmp_path / "token"
    file.write_text(COORDINATOR_TOKEN + "\n")
    file.chmod(0o600)
    return str(file)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "checkpoints", maximum=3)


def test_status_lists_experiments_and_shows_one_by_name(
    rig: Rig, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = TrunkServer(rig.experiments, coordinator_token=COORDINATOR_TOKEN)
    with closing(rig.experiments), server:
        port = server.start()
        with coordinator(port) as one, coordinator(port) as two:
            one.begin_round(plan("first", 4))
            two.begin_round(plan("second"))
        command = ["status", f"127.0.0.1:{port}", "--token-file", token]
        assert main(command) == 0
        table = " ".join(capsys.readouterr().out.split())
        assert "2 experiments of yours 3 places" in table
        assert "first │ joining │ 4.0 │ 1" in table and "second │ joining │ 1.0 │ 1" in table
        assert main([*command, "--experiment", "first", "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert (status["experiment"], status["server_round"]) == ("first", 4)
        assert status["slots"][0]["slot"] == 0


def test_release_frees_one_place_and_asks_for_its_name(
    rig: Rig, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = TrunkServer(rig.experiments, coordinator_token=COORDINATOR_TOKEN)
    with closing(rig.experiments), server:
        port = server.start()
        with coordinator(port) as one, coordinator(port) as two:
            one.begin_round(plan("first"))
            two.begin_round(plan("second"))
            with closing(join(port, "second")) as trunk:
                command = ["trunk-release", f"127.0.0.1:{port}", "--token-file", token]
                assert main(command) == 1
                assert "--experiment NAME, of first, second" in capsys.readouterr().err
                assert main([*command, "--experiment", "second"]) == 1  # its client is at work
                assert main([*command, "--experiment", "first"]) == 0
                assert "1 of 3 places" in capsys.readouterr().out
                assert sorted(rig.experiments.engines()) == ["second"]
                train(trunk)
            assert two.prepare_round("second", 1, 0).slots[0].completed


def test_audit_log_names_the_experiment_of_every_client(rig: Rig, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    with AuditLog(log) as audit:
        server = TrunkServer(rig.experiments, coordinator_token=COORDINATOR_TOKEN, audit=audit)
        with closing(rig.experiments), server:
            port = server.start()
            with coordinator(port) as one, coordinator(port) as two:
                one.begin_round(plan("first"))
                two.begin_round(plan("second"))
                for name in ("first", "second"):
                    with closing(join(port, name)) as trunk:
                        train(trunk)
    verify_audit_log([log])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for rpc in ("OpenSession", "Forward", "Backward", "CloseSession"):
        keys = [line["key"] for line in lines if line["rpc"] == rpc]
        assert ["experiment=first" in key for key in keys] == [True, False]
        assert ["experiment=second" in key for key in keys] == [False, True]


def test_figures_have_the_experiments_name(rig: Rig) -> None:
    pytest.importorskip("prometheus_client", reason="the extra metrics")
    from flower_split.trunk.service.metrics import Sources, TrunkCollector

    with closing(rig.experiments):
        for name, server_round in (("first", 4), ("second", 1)):
            engine = rig.experiments.begin("", name, None)
            engine.begin_round(plan(name, server_round))
        sources = Sources(
            status=rig.experiments.status, experiments=rig.experiments.statuses, refusals=dict
        )
        found = {
            (sample.name.removeprefix("flower_split_trunk_"), *sample.labels.values()): sample.value
            for family in TrunkCollector(sources).collect()
            for sample in family.samples
        }
    assert found["max_experiments",] == 3
    assert (found["server_round", "first"], found["server_round", "second"]) == (4, 1)
    assert found["phase", "first", "joining"] == found["phase", "second", "joining"] == 1
    assert found["slot_joined", "first", "0"] == 0
    assert ("server_round",) not in found  # of no experiment in particular
    assert found["accelerator_bytes",] == 0


@pytest.mark.parametrize("coordinators", [(("no name", "f"),), (("a", "f"), ("a", "g"))])
def test_coordinators_have_names_of_their_own(coordinators: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(ConfigError, match="--coordinator must be NAME=FILE"):
        Serving(token=COORDINATOR_TOKEN, coordinators=coordinators)
