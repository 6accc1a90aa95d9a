"""A trunk that would train otherwise than the run's record says is refused, with both values."""

from dataclasses import replace
from pathlib import Path

import pytest

from flower_split.cli.preflight import check_trunk
from flower_split.cli.trunk_login import TrunkLogin
from flower_split.config import Scalar, parse_run_config
from flower_split.errors import ConfigError, RefusalReason, TrunkRefused
from flower_split.messages.client_facts import ClientFacts
from flower_split.parties.fingerprint import settings
from flower_split.protocol.values import ProcessReport, TrunkStatus
from flower_split.runtime.secret_files import TOKEN_VARIABLE, TokenFile
from flower_split.runtime.version import __version__
from flower_split.server.federation.version_notes import version_notes
from flower_split.server.trunk_connection import (
    check_settings,
    connect_trunk,
    coordinator_token,
)
from flower_split.trunk.engine.sessions import check_fingerprint
from tests.support.loopback import COORDINATOR_TOKEN, TinyTrunk, make_engine, served

RUN = parse_run_config({"trunk.address": "trunk.example:9500"})


def trunk_of(**changes: Scalar) -> TrunkStatus:
    """The answer of a trunk that was started with other settings."""
    keys = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    fingerprint = {**settings(parse_run_config(keys)), "weights": "w", "model": "m"}
    process = ProcessReport(package_version="7.7")
    return TrunkStatus(epoch=1, version=0, fingerprint=fingerprint, process=process)


@pytest.mark.parametrize(
    ("changes", "field", "mine", "theirs"),
    [
        ({"seed": 3}, "seed", "0", "3"),
        ({"trunk__optimizer__name": "sgd"}, "trunk.optimizer.name", "adamw", "sgd"),
        (
            {"trunk__optimizer__learning_rate": 1e-9},
            "trunk.optimizer.learning-rate",
            "0.002",
            "1e-09",
        ),
        (
            {"trunk__optimizer__max_grad_norm": 0.5},
            "trunk.optimizer.max-grad-norm",
            "1.0",
            "0.5",
        ),
        ({"trunk__reduction": "median"}, "trunk.reduction", "mean", "median"),
        ({"trunk__max_client_grad_norm": 2.0}, "trunk.max-client-grad-norm", "0", "2"),
        ({"trunk__wire_dtype": "bfloat16"}, "codec", "native", "bfloat16"),
        ({"trunk__num_threads": 4}, "trunk.num-threads", "1", "4"),
        ({"trunk__train": "full"}, "trunk.train", "lora", "full"),
        ({"lora__trunk__r": 3}, "lora.trunk", "r=8", "r=3"),
    ],
)
def test_trunk_of_other_settings_is_refused_with_both_values(
    changes: dict[str, Scalar], field: str, mine: str, theirs: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings(RUN, trunk_of(**changes))
    text = str(caught.value)
    named = text.partition(f"{field} (run: ")[2].partition(")")[0]
    assert mine in named.partition(", trunk: ")[0] and theirs in named.partition(", trunk: ")[2]
    assert "trunk.example:9500" in text and "7.7" in text and __version__ in text
    assert "flower-split trunk APP" in text


def test_trunk_of_the_runs_settings_is_taken_on_whatever_device_and_with_a_wider_span() -> None:
    same = trunk_of(trunk__device="cuda:1", trunk__call_timeout=9.0, model__second_cut=5)
    check_settings(RUN, same)


def test_trunk_that_tells_fewer_fields_is_refused() -> None:
    status = trunk_of()
    fields = {name: value for name, value in status.fingerprint.items() if name != "seed"}
    with pytest.raises(ConfigError, match=r"seed \(run: 0, trunk: None\)"):
        check_settings(RUN, replace(status, fingerprint=fields))


def test_trunk_itself_refuses_a_client_of_another_rate_but_not_an_evaluation() -> None:
    mine = dict(trunk_of().fingerprint)
    theirs = dict(trunk_of(trunk__optimizer__learning_rate=1e-9).fingerprint)
    with pytest.raises(
        TrunkRefused, match=r"learning-rate \(trunk: 0.002, client: 1e-09\)"
    ) as caught:
        check_fingerprint(mine, theirs, 2)
    assert caught.value.reason is RefusalReason.FINGERPRINT_MISMATCH
    check_fingerprint(mine, theirs, 2, evaluate=True)
    with pytest.raises(TrunkRefused, match="weights"):
        check_fingerprint(mine, {**theirs, "weights": "v"}, 2, evaluate=True)


def facts(version: str) -> ClientFacts:
    return ClientFacts(
        partition_id=0,
        num_partitions=2,
        num_examples=1,
        num_eval_examples=1,
        planned_steps=1,
        concurrency=0,
        fingerprint={},
        package_version=version,
    )


def test_versions_that_differ_are_noted_with_who_has_them() -> None:
    same = {0: facts(__version__), 1: facts(__version__)}
    assert version_notes(same, __version__) == []
    [note] = version_notes({**same, 1: facts("0.0.9")}, "0.0.9")
    assert f"{__version__} (the ServerApp, partition 0)" in note
    assert "0.0.9 (the trunk, partition 1)" in note


def test_command_and_server_app_both_look_before_any_client_is_asked(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(COORDINATOR_TOKEN)
    token.chmod(0o600)
    with served(make_engine(TinyTrunk())) as port:
        keys = {"trunk.address": f"127.0.0.1:{port}", "trunk.token-file": str(token)}
        config = parse_run_config(keys)
        with pytest.raises(ConfigError, match="speaks protocol 2, the trunk .* 1"):
            check_trunk(config)
        with (
            pytest.raises(ConfigError, match="speaks protocol 2, the trunk .* 1"),
            connect_trunk(config, tmp_path),
        ):
            pass


def test_token_of_the_environment_serves_where_no_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, f"{COORDINATOR_TOKEN}\n")
    with served(make_engine(TinyTrunk())) as port:
        config = parse_run_config({"trunk.address": f"127.0.0.1:{port}"})
        with (  # the trunk let it in, and answered
            pytest.raises(ConfigError, match="speaks protocol 2, the trunk .* 1"),
            connect_trunk(config, tmp_path),
        ):
            pass
        with pytest.raises(ConfigError, match="speaks protocol 2"):
            check_trunk(config)
        login = TrunkLogin(address=config.trunk.address, token_file=None)
        with login.coordinator() as coordinator:
            assert coordinator.status().phase == "idle"
        monkeypatch.setenv(TOKEN_VARIABLE, "another token, long enough")
        with pytest.raises(TrunkRefused), login.coordinator() as coordinator:
            coordinator.status()
    assert COORDINATOR_TOKEN not in caplog.text


def test_named_file_comes_before_the_environments_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("the token of the file")
    file.chmod(0o600)
    environment = {TOKEN_VARIABLE: "the token of the environment"}
    assert coordinator_token("", environment) == "the token of the environment"
    named = coordinator_token(str(file), environment)
    assert isinstance(named, TokenFile) and named.tokens() == ("the token of the file",)


def test_run_without_any_token_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"trunk.token-file names no file, and {TOKEN_VARIABLE}"):
        coordinator_token("", {})
    with pytest.raises(ConfigError, match=f"{TOKEN_VARIABLE}: .*at least 16 characters"):
        coordinator_token("", {TOKEN_VARIABLE: "short"})


def test_hosted_run_is_submitted_from_a_machine_without_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    config = parse_run_config({"trunk.address": "127.0.0.1:1"})
    check_trunk(config, hosted=True)  # asks nobody
    with pytest.raises(ConfigError, match="names no file"):
        check_trunk(config)
