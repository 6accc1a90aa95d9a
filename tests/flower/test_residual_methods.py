"""Methods that change the base, with real clients and a real trunk, against dense fp64 sums."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from flower_split.arrays import from_arrays
from flower_split.config import Scalar, parse_run_config
from flower_split.report import RunDirectory
from flower_split.server_app import run
from tests.flower.local_grid import LocalGrid, TrunkHere
from tests.flower.tiny import make_data, make_model, tiny_config

CLIENTS, ROUNDS, SCALE = 3, 3, 4.0  # alpha 16, rank 4
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
                (record,) = message.content.config_records.values()
                self.trained.setdefault(int(str(record["server-round"])), []).append(
                    (message, reply)
                )
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
        grid = RecordingGrid(CLIENTS, config)
        run(grid, parse_run_config(config))
        return Outcome(RunDirectory.open(self.root / name), grid.trained)


@pytest.fixture
def job(tmp_path: Path, parts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("flower_split.server_app.TrunkProcess", TrunkHere)
    return Job(tmp_path, *parts)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("parts")
    return make_model(root / "model"), make_data(root / "data", CLIENTS)


def dense(adapter: State) -> State:
    """Module → scale · B A of an adapter in fp64, as PEFT's layers compute it."""
    found = {}
    for name, a in adapter.items():
        if name.endswith("lora_A.weight"):
            b = adapter[name.replace("lora_A", "lora_B")]
            found[name.removesuffix(".lora_A.weight")] = SCALE * b.double() @ a.double()
        elif name.endswith("lora_embedding_A"):
            b = adapter[name.replace("embedding_A", "embedding_B")]
            found[name.removesuffix(".lora_embedding_A")] = SCALE * (b.double() @ a.double()).T
    return found


def dense_change(state: State) -> State:
    return {
        name.removesuffix(".base_A"): state[name.replace("base_A", "base_B")].double() @ a.double()
        for name, a in state.items()
        if name.endswith("base_A")
    }


def arrays(message: Message, name: str) -> State:
    record = message.content.array_records.get(name)
    return {} if record is None else from_arrays(record)


def mean_of(pairs: list[tuple[Message, Message]]) -> State:
    """Σ n ΔW / Σ n over what the clients returned."""
    tokens = [float(str(reply.content["metrics"]["num-tokens"])) for _, reply in pairs]
    deltas = [dense(arrays(reply, "arrays")) for _, reply in pairs]
    return {
        module: sum(n * delta[module] for n, delta in zip(tokens, deltas, strict=True))
        / sum(tokens)
        for module in deltas[0]
    }


def distance(found: State, expected: State) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


def drift(outcome: Outcome) -> float:
    """The largest distance, after any round, of what clients go on from and the dense mean.

    Everything is told from the messages alone: before a round a client's weight is
    base + change + ΔW(sent), afterwards base + change + ΔW(returned); the mean of the latter is
    what the next round's clients must begin with.
    """
    worst, final = 0.0, outcome.directory
    expected: State | None = None
    for server_round in range(1, ROUNDS + 2):
        if server_round <= ROUNDS:
            message = outcome.trained[server_round][0][0]
            change = dense_change(arrays(message, "base-change"))
            sent = dense(arrays(message, "arrays"))
        else:
            sent = dense(final.read_adapter("client"))
            there = (final.path / "adapters/base.safetensors").exists()
            change = dense_change(final.read_adapter("base")) if there else {}
        now = {module: sent[module] + change.get(module, 0) for module in sent}
        if expected is not None:
            worst = max(worst, distance(now, expected))
        if server_round <= ROUNDS:
            mean = mean_of(outcome.trained[server_round])
            expected = {module: mean[module] + change.get(module, 0) for module in mean}
    return worst


@pytest.mark.parametrize("aggregator", ["flora", "fedex-lora"])
def test_run_whose_method_changes_the_base_is_exactly_the_mean_of_the_clients(
    job: Job, aggregator: str
) -> None:
    outcome = job.run("run", aggregator)
    assert drift(outcome) < 1e-6
    for pairs in outcome.trained.values():
        assert len(pairs) == CLIENTS
    _, reply = outcome.trained[ROUNDS][0]
    assert list(reply.content.array_records) == ["arrays"]
    assert not any("base_" in name for name in arrays(reply, "arrays"))


def test_run_with_fedit_is_not_the_mean_of_the_clients(job: Job) -> None:
    assert drift(job.run("run", "fedit")) > 1e-2
