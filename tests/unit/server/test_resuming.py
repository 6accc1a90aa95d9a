"""How a run goes on: where its rounds begin, and the command in the error that ended it."""

from pathlib import Path

import pytest
from flwr.serverapp.strategy import FedAvg

from flower_split.config import parse_run_config
from flower_split.errors import FederationError
from flower_split.protocol.values import RoundBase
from flower_split.runs.directory import RunDirectory
from flower_split.runs.manifest import CommittedRound
from flower_split.server.resuming import resume_command, starting_point


class Own(FedAvg):
    """A strategy whose state nobody knows."""


def test_new_run_begins_an_experiment_of_its_own_at_the_initial_weights(tmp_path: Path) -> None:
    directory = RunDirectory.create(parse_run_config({"run-dir": str(tmp_path / "mine")}))
    one, two = starting_point(directory, None), starting_point(directory, None)
    assert one.experiment.startswith("mine-") and one.experiment != two.experiment
    assert (one.attempt, one.base) == (0, RoundBase(0))


def test_resumed_run_keeps_its_experiment_and_takes_an_unused_attempt(tmp_path: Path) -> None:
    directory = RunDirectory.create(parse_run_config({"run-dir": str(tmp_path / "mine")}))
    entry = CommittedRound(
        experiment="mine-1",
        server_round=3,
        attempt=5,
        trunk_digest="abc",
        trunk_version=9,
        file="",
        file_sha256="",
    )
    start = starting_point(directory, entry)
    assert (start.experiment, start.attempt, start.base) == ("mine-1", 6, RoundBase(3, "abc"))


def notes_of(inner: FedAvg) -> list[str]:
    with pytest.raises(FederationError, match="^a node left") as caught:
        with resume_command(Path("/runs/with space"), inner):
            raise FederationError("a node left")
    return getattr(caught.value, "__notes__", [])


def test_failure_ends_with_the_command_that_resumes_the_run() -> None:
    (note,) = notes_of(FedAvg())
    assert note.endswith("flower-split run APP --resume '/runs/with space'")


def test_run_that_cannot_be_resumed_gets_no_command() -> None:
    assert notes_of(Own()) == []
