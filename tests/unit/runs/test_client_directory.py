"""Where a client keeps what is its own."""

from pathlib import Path

import pytest

from flower_split.config import parse_run_config
from flower_split.runs.private_factors import client_directory

CONFIG = parse_run_config({})


def test_a_node_of_a_local_run_keeps_it_in_the_run_directory() -> None:
    assert client_directory(CONFIG, {"simulated": True}, "run/clients") == Path("run/clients")


def test_a_directory_that_is_named_comes_first() -> None:
    node = {"simulated": True, "client-dir": "own"}
    assert client_directory(CONFIG, node, "run/clients") == Path("own")


def test_a_client_on_a_machine_of_its_own_uses_flowers_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLWR_HOME", "/flower")
    assert client_directory(CONFIG, {}, "run/clients") == Path("/flower/flower-split/clients")
