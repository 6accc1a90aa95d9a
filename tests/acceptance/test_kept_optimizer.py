"""A client's optimizer that goes on from round to round, exactly once, with real clients."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor
from transformers import AutoModelForCausalLM

from flower_split.client.client import Client
from flower_split.client.model_cache import RunCache
from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.errors import RoundLost, RunDirectoryError, TrunkUnavailable
from flower_split.lora import adapter_state, attach_lora, load_adapter_state
from flower_split.messages.orders import TrainOrder
from flower_split.parties.parts import all_parts, client_parts, model_cuts
from flower_split.results.client_adapter import OneClient, read_client_adapter
from flower_split.runs.directory import RunDirectory
from flower_split.runs.private_factors import PrivateFolder
from flower_split.server.app import run
from flower_split.server.step_ends import GRADIENTS_ARE_SEEN
from flower_split.training.optimizers import PartOptimizer
from flower_split.training.round import train_round
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.recording import (
    CLIENTS,
    ROUNDS,
    Job,
    Outcome,
    State,
    assert_same_end,
    fail_commit,
)
from tests.support.tiny_app import make_data, make_model, tiny_config


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("parts")
    return make_model(root / "model"), make_data(root / "data", CLIENTS)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, parts: tuple[Path, str]) -> Iterator[Outcome]:
    """A run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
        for name in ("_run_id", "_node_id", "_task_id"):  # this lives longer than a test's own
            patch.setattr(TaskIdentity, name, 1)
        yield keep(Job(tmp_path_factory.mktemp("calm"), *parts), "calm")


@pytest.fixture
def job(tmp_path: Path, parts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    return Job(tmp_path, *parts)


def settings(job: Job, **changes: Scalar) -> dict[str, Scalar]:
    return {
        "mode": "frozen",
        "train__optimizer_state": "keep",
        "train__client_dir": str(job.root / "own"),
        **adamw("train"),
        **changes,
    }


def adamw(side: str) -> dict[str, Scalar]:
    return {f"{side}__optimizer__name": "adamw", f"{side}__optimizer__learning_rate": 0.01}


def keep(job: Job, name: str, method: str = "fedit", **changes: Scalar) -> Outcome:
    return job.run(name, method, **settings(job, **changes))


def by_hand(config: RunConfig) -> State:
    """Mean of adapters over clients, each with one optimizer over all rounds, on the unsplit model.

    The clients' rate is multiplied by the square root of their number.
    """
    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    attach_lora(model, model_cuts(config), client_parts(config), seed=config.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    clients = [Client(RunCache(config), slot, CLIENTS) for slot in range(CLIENTS)]
    total = clients[0].position(1).total_steps
    settings = config.train.optimizer
    scaled = replace(settings, learning_rate=settings.learning_rate * CLIENTS**0.5)
    optimizers = [PartOptimizer(trained, scaled, total) for _ in clients]
    adapter = adapter_state(model)
    for server_round in range(1, ROUNDS + 1):
        sums: dict[str, Tensor] = {name: torch.zeros(1).double() for name in adapter}
        tokens = 0
        for client, optimizer in zip(clients, optimizers, strict=True):
            load_adapter_state(model, adapter)
            position, batches = client.position(server_round), client.batches(server_round)
            done = train_round(model, batches, config, position, None, optimizers=[optimizer])
            sums = {
                name: sums[name] + done.num_tokens * tensor.double()
                for name, tensor in adapter_state(model).items()
            }
            tokens += done.num_tokens
        adapter = {name: (total_ / tokens).float() for name, total_ in sums.items()}
    return adapter


def test_run_is_one_optimizer_per_client_on_the_unsplit_model(calm: Outcome, job: Job) -> None:
    found = calm.directory.read_adapter("client")
    expected = by_hand(calm.directory.config)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    reset = keep(job, "reset", train__optimizer_state="reset").directory.read_adapter("client")
    assert all(not torch.allclose(reset[name], found[name], rtol=1e-3) for name in found)


def test_only_training_orders_name_a_state_and_no_message_carries_one(calm: Outcome) -> None:
    for server_round, pairs in calm.trained.items():
        for message, reply in pairs:
            private = TrainOrder.read(message.content).private
            assert private is not None and private.optimizer and private.names == ()
            assert bool(private.digest) == (server_round > 1)
            names = {n for record in reply.content.array_records.values() for n in record}
            assert names and not any(name.startswith("optimizer/") for name in names)


def test_round_that_was_lost_leaves_no_state_to_go_on_from(
    calm: Outcome, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = fail_commit(monkeypatch, 2, RoundLost("the connection was lost"))
    again = keep(job, "again")
    assert failed == [2] and len(again.trained[2]) == 2 * CLIENTS
    assert_same_end(calm.directory, again.directory, ("client",))


def test_client_that_died_after_keeping_its_state_trains_the_round_again(
    calm: Outcome, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, died = PrivateFolder.write, []

    def dying(self: PrivateFolder, state: State, *, server_round: int, base: str) -> str:
        digest = write(self, state, server_round=server_round, base=base)
        if server_round == 2 and not died:
            died.append(self.path.name)
            raise TrunkUnavailable("the process was killed before it could answer")
        return digest

    monkeypatch.setattr(PrivateFolder, "write", dying)
    again = keep(job, "again")
    assert len(died) == 1 and len(again.trained[2]) > CLIENTS
    assert_same_end(calm.directory, again.directory, ("client",))


def test_resumed_run_goes_on_from_committed_states(
    calm: Outcome, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_commit(monkeypatch, 3, RunDirectoryError("the disk is full"))
    with pytest.raises(RunDirectoryError, match="the disk is full"):
        keep(job, "killed")
    config = job.config("killed", "fedit", **settings(job))
    resumed = job.go("killed", {**config, "resume": str(job.root / "killed")})
    assert sorted(resumed.trained) == [3]
    assert_same_end(calm.directory, resumed.directory, ("client",))


def test_state_beside_private_factors_is_no_part_of_a_clients_adapter(job: Job) -> None:
    directory = keep(job, "both", "fedsa-lora").directory
    own = read_client_adapter(directory, OneClient(partition_id=1))
    assert own.keys() == directory.read_adapter("client").keys()
    (folder,) = (job.root / "own").glob("run-*/partition-1")
    names = PrivateFolder(folder).read(next(folder.glob("round-3.*")).name.split(".")[1])
    assert {name.partition("/")[0] for name in names if "/" in name} == {"optimizer"}


def test_simulated_client_without_a_directory_keeps_its_state_in_the_run(
    calm: Outcome, job: Job
) -> None:
    run = keep(job, "run", train__client_dir="")
    assert_same_end(calm.directory, run.directory, ("client",))
    assert list((run.directory.path / "clients").rglob("*.safetensors"))


def test_one_client_that_shares_its_gradients_is_the_unsplit_model_over_all_rounds(
    parts: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the ServerApp: one optimizer over three rounds, and aggregation is the identity."""
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    raw = tiny_config(
        *parts,
        strategy__aggregator="fedit",
        num_clients=1,
        num_server_rounds=ROUNDS,
        train__local_steps=2,
        train__sync="gradients",
        train__max_grad_norm_over="model",
        train__client_dir=str(tmp_path / "own"),
        local_only_baseline=False,
        **adamw("train"),
        **adamw("trunk"),
    )
    raw["run-dir"] = str(tmp_path / "run")
    config = parse_run_config(raw)
    run(LocalGrid(1, raw), config)
    directory = RunDirectory.open(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    attach_lora(model, model_cuts(config), all_parts(config), seed=config.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    client = Client(RunCache(config), 0, 1)
    optimizer = PartOptimizer(trained, config.train.optimizer, client.position(1).total_steps)
    for server_round in range(1, ROUNDS + 1):
        position, batches = client.position(server_round), client.batches(server_round)
        train_round(model, batches, config, position, None, optimizers=[optimizer])
    expected = adapter_state(model)
    found = {**directory.read_adapter("client"), **directory.read_adapter("trunk")}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    assert GRADIENTS_ARE_SEEN in (directory.path / "report.md").read_text()
