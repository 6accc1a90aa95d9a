"""Tiny jobs in this process that keep the messages of their training phases."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from flower_split.config import Scalar, parse_run_config
from flower_split.errors import FlowerSplitError
from flower_split.messages.arrays import from_arrays
from flower_split.messages.orders import TrainOrder
from flower_split.runs.directory import RunDirectory
from flower_split.runs.manifest import RunCheckpoints
from flower_split.server.app import run
from tests.support.local_grid import LocalGrid
from tests.support.tiny_app import tiny_config

CLIENTS, ROUNDS = 3, 3
State = dict[str, Tensor]


class RecordingGrid(LocalGrid):
    """Keeps every training message and its reply."""

    def __init__(self, num_clients: int, config: dict[str, Scalar]) -> None:
        super().__init__(num_clients, config)
        self.trained: dict[int, list[tuple[Message, Message]]] = {}
        self._by_id: dict[str, Message] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            message = next(
                m
                for m in self.pushed
                if m.metadata.message_id == reply.metadata.reply_to_message_id
            )
            if message.metadata.message_type == "train":
                server_round = TrainOrder.read(message.content).trunk.server_round
                self.trained.setdefault(server_round, []).append((message, reply))
        return replies


@dataclass
class Outcome:
    """A finished run, and the messages of its training phases."""

    directory: RunDirectory
    trained: dict[int, list[tuple[Message, Message]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Runs tiny jobs in this process."""

    root: Path
    model: Path
    data: str

    def config(self, name: str, aggregator: str, **changes: Scalar) -> dict[str, Scalar]:
        config = tiny_config(
            self.model,
            self.data,
            strategy__aggregator=aggregator,
            trunk__step_every="server-round",
            num_server_rounds=ROUNDS,
            num_clients=CLIENTS,
            train__local_steps=2,
            lora__top__target_modules="down_proj,lm_head",
            lora__bottom__target_modules="q_proj,embed_tokens",
            local_only_baseline=False,
            **changes,
        )
        return {**config, "run-dir": str(self.root / name)}

    def run(self, name: str, aggregator: str, **changes: Scalar) -> Outcome:
        config = self.config(name, aggregator, **changes)
        return self.go(name, config)

    def go(self, name: str, config: dict[str, Scalar]) -> Outcome:
        grid = RecordingGrid(CLIENTS, config)
        run(grid, parse_run_config(config))
        return Outcome(RunDirectory.open(self.root / name), grid.trained)


def arrays(message: Message, name: str) -> State:
    record = message.content.array_records.get(name)
    return {} if record is None else from_arrays(record)


def fail_commit(
    monkeypatch: pytest.MonkeyPatch, server_round: int, error: FlowerSplitError
) -> list[int]:
    """The first commit of this round fails; returns a list of the rounds in which it did."""
    commit, failed = RunCheckpoints.commit, []

    def failing(self: RunCheckpoints, **arguments: object) -> None:
        if arguments["server_round"] == server_round and not failed:
            failed.append(server_round)
            raise error
        commit(self, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RunCheckpoints, "commit", failing)
    return failed


def assert_same_end(one: RunDirectory, two: RunDirectory, parts: tuple[str, ...]) -> None:
    for part in parts:
        expected, found = one.read_adapter(part), two.read_adapter(part)
        assert expected.keys() == found.keys() and expected
        assert all(torch.equal(found[name], expected[name]) for name in expected)
