"""The command line: errors as one paragraph, exit codes, checks before anything starts."""

import os
import stat
from pathlib import Path

import pytest

from flower_split.cli.app_config import load_app, load_app_config
from flower_split.cli.main import main
from flower_split.cli.preflight import simulation_settings
from flower_split.cli.trunk import token_from
from flower_split.config import Scalar, parse_run_config
from flower_split.errors import ConfigError
from flower_split.trunk.serve import Serving
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def app_with(path: Path, model: Path, **changes: Scalar) -> Path:
    return make_app(path / "app", tiny_config(model, make_data(path / "data", 2), **changes))


def message_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("flower-split: ") and error.count("\n") == 1, error
    return error


def test_main_without_a_command_exits_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


def test_run_of_no_app_exits_with_2_and_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(tmp_path)]) == 2
    assert "pyproject.toml" in message_of(capsys)


def test_run_with_an_unknown_key_exits_with_2_and_names_the_nearest(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = app_with(tmp_path, model)
    assert main(["run", str(app), "--run-config", "train.local-step=3"]) == 2
    assert "'train.local-steps'" in message_of(capsys)


def test_run_with_an_aggregation_that_cannot_be_says_why(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = app_with(tmp_path, model)
    given = 'strategy.aggregator="fedit" strategy.server-optimizer="adam"'
    assert main(["run", str(app), "-c", given]) > 0
    assert "fedit takes no server optimizer" in message_of(capsys)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('strategy.aggregator="fedit" lora.rank-by-partition="0=2"', "needs one rank for all"),
        ('strategy.name="fedavg" lora.rank-by-partition="0=2"', "cannot mix clients"),
        ('strategy.name="krum"', "at least 3 clients in a round"),
        ('strategy.rules="krum=1"', "at least 5 clients in a round"),
        ('strategy.name="fedtrimmedavg" strategy.options="beta=0.5"', "range [0, 0.5)"),
        ('privacy.mechanism="client-fixed"', 'strategy.name = "fedavg"'),
        ('strategy.name="fedavg" privacy.mechanism="client-fixed"', "equal weight"),
        ('strategy.aggregator="flora" privacy.mechanism="local"', "cannot be combined"),
    ],
)
def test_run_of_a_simulation_that_its_clients_cannot_have_is_refused_before_it_starts(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    words: str,
) -> None:
    started: list[object] = []
    monkeypatch.setattr("flower_split.cli.run.LocalSuperLink.start", started.append)
    app = app_with(tmp_path, model)
    assert main(["run", str(app), "-c", given]) > 0
    assert words in message_of(capsys) and not started


def test_app_with_a_server_app_of_its_own_may_have_a_strategy_that_no_key_names(
    tmp_path: Path, model: Path
) -> None:
    app = app_with(tmp_path, model)
    assert not load_app(app).has_own_server_app
    project = app / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    assert "flower_split.server.app:app" in text
    project.write_text(text.replace("flower_split.server.app:app", "mine:app"), encoding="utf-8")
    assert load_app(app).has_own_server_app


def test_run_with_a_value_out_of_range_exits_with_2(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = app_with(tmp_path, model)
    assert main(["run", str(app), "-c", 'mode="jiont"']) == 2
    assert "joint, frozen, forward-only" in message_of(capsys)


def test_run_with_cut_layers_beyond_the_model_exits_with_1_and_names_the_range(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = app_with(tmp_path, model)
    assert main(["run", str(app), "-c", "model.second-cut=9"]) == 1
    text = message_of(capsys)
    assert "4 layers" in text and "second=9" in text


def test_run_with_a_trunk_that_is_not_there_exits_with_1_within_its_deadline(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flower_split.cli.preflight._CONTROL_SECONDS", 1.0)
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    app = app_with(tmp_path, model, trunk__address="127.0.0.1:1", trunk__token_file=str(token))
    # an underscore in a key's own name is a dash: tiny_config does that
    assert main(["run", str(app)]) == 1
    assert "127.0.0.1:1" in message_of(capsys)


def test_run_with_a_trunk_address_but_no_token_file_exits_with_2(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = app_with(tmp_path, model, trunk__address="127.0.0.1:1")
    assert main(["run", str(app)]) == 2
    assert "trunk.token-file" in message_of(capsys)


def test_run_with_a_federation_that_is_too_small_exits_with_2(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = app_with(tmp_path, model)
    assert main(["run", str(app), "--federation-config", "num-supernodes=1"]) == 2
    assert "num-supernodes=2 client-resources-num-cpus=1" in message_of(capsys)


def test_export_of_no_run_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert "none" in message_of(capsys)


def test_load_app_config_applies_overrides(tmp_path: Path, model: Path) -> None:
    app = app_with(tmp_path, model)
    config = load_app_config(app, ["num-server-rounds=7 trunk.optimizer.name='adam'"])
    assert config.num_server_rounds == 7
    assert config.trunk.optimizer.name == "adam"
    assert config.model.name == str(model)


def test_load_app_config_with_a_broken_override_shows_an_example(
    tmp_path: Path, model: Path
) -> None:
    with pytest.raises(ConfigError, match="num-server-rounds=5"):
        load_app_config(app_with(tmp_path, model), ["mode=joint"])  # TOML wants quotes


@pytest.mark.parametrize("given", [None, ""])
def test_simulation_settings_without_any_are_what_the_job_needs(given: str | None) -> None:
    config = parse_run_config({"num-clients": 3, "train.device": "cpu"})
    assert simulation_settings(config, given) == (
        "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=3"
    )


def test_simulation_settings_with_too_few_at_once_are_refused_for_a_window_per_step() -> None:
    given = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"
    config = parse_run_config({"train.device": "cpu"})
    with pytest.raises(ConfigError, match="init-args-num-cpus=4"):
        simulation_settings(config, given)
    windows = parse_run_config({"train.device": "cpu", "trunk.step-every": "server-round"})
    assert simulation_settings(windows, given) == given


def test_token_from_a_missing_file_makes_one_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = token_from(path)
    assert len(token) >= 32
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert token_from(path) == token


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"listen": "9000"}, "HOST:PORT"),
        ({"listen": "host:port"}, "HOST:PORT"),
        ({"token": "short"}, "16 characters"),
        ({"tls_certificate": "x.pem"}, "--tls-key"),
    ],
)
def test_serving_with_a_wrong_value_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Serving(**{"token": "0123456789abcdef", **changes})
