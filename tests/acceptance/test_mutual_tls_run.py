"""A whole run on a trunk that asks for certificates, with those of ``flower-split certs``."""

import json
from pathlib import Path

import pytest

from flower_split.cli.main import main
from flower_split.config import Scalar, parse_run_config
from flower_split.errors import TrunkError, TrunkUnavailable
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from flower_split.trunk.serve import RunningTrunk, Serving
from flower_split.wire.grpc_health import health_of
from tests.support.local_grid import LocalGrid
from tests.support.tiny_app import make_data, make_model, tiny_config

TOKEN = "a coordinator's token of enough characters"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "certificates"
    names = ("server-app", "clinic-a", "clinic-b")
    assert (
        main(["certs", str(folder), *(word for name in names for word in ("--client", name))]) == 0
    )
    return folder


def test_run_over_mutual_tls_shows_each_machines_own_certificate(
    certificates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token, audit = tmp_path / "token", tmp_path / "audit.jsonl"
    token.write_text(TOKEN)
    token.chmod(0o600)
    clients = tmp_path / "clients"
    clients.write_text("clinic-a\nclinic-b\n")
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", 2)
    config: dict[str, Scalar] = {
        **tiny_config(model, data, trunk__step_every="server-round"),
        "run-dir": str(tmp_path / "run"),
        "trunk.token-file": str(token),
        "trunk.root-certificates": str(certificates / "ca.crt"),
    }
    shown: dict[str, Scalar] = {
        "trunk.client-certificate": str(certificates / "server-app.crt"),
        "trunk.client-key": str(certificates / "server-app.key"),
    }
    serving = Serving(
        token=TOKEN,
        token_file=str(token),
        tls_certificate=str(certificates / "server.crt"),
        tls_key=str(certificates / "server.key"),
        client_ca=str(certificates / "ca.crt"),
        health_listen="127.0.0.1:0",
        allow_clients=(f"@{clients}",),
        allow_coordinators=("server-app",),
        audit_log=str(audit),
    )
    with RunningTrunk(parse_run_config(config), serving) as trunk:
        config["trunk.address"] = f"127.0.0.1:{trunk.port}"
        with pytest.raises(TrunkError, match="asks for a client certificate") as caught:
            first = {**config, "run-dir": str(tmp_path / "refused")}
            run(LocalGrid(2, first), parse_run_config(first))
        assert not isinstance(caught.value, TrunkUnavailable)
        config |= shown
        grid = LocalGrid(2, config)
        for node, name in ((100, "clinic-a"), (101, "clinic-b")):
            grid.contexts[node].node_config |= {
                "client-certificate": str(certificates / f"{name}.crt"),
                "client-key": str(certificates / f"{name}.key"),
            }
        run(grid, parse_run_config(config))
        assert health_of(f"127.0.0.1:{trunk.health_port}") == "SERVING"  # as a probe without one
        options = [
            str(config["trunk.address"]),
            "--root-certificates",
            str(certificates / "ca.crt"),
        ]
        pair = [str(certificates / "server-app.crt"), "--client-key"]
        options += ["--client-certificate", *pair, str(certificates / "server-app.key")]
        assert main(["health", *options]) == 0
        assert main(["status", *options, "--token-file", str(token), "--json"]) == 0
        assert '"server_round": 1' in capsys.readouterr().out
    assert RunDirectory.open(tmp_path / "run").read_adapter("trunk")
    callers = {
        (line["rpc"], line["certificate"])
        for line in map(json.loads, audit.read_text().splitlines())
        if line["outcome"] == "OK"
    }
    for call in (
        ("OpenSession", "clinic-a"),
        ("Backward", "clinic-b"),
        ("CommitRound", "server-app"),
    ):
        assert call in callers
    assert {name for rpc, name in callers if rpc == "OpenSession"} == {"clinic-a", "clinic-b"}
