"""FedBuff end to end: the whole ServerApp, real clients and a real trunk, with a slow client."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from torch import Tensor
from transformers import AutoModelForCausalLM

from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.data import load_client_data, load_tokenizer
from flower_split.data.batches import collate
from flower_split.errors import FederationError
from flower_split.lora import attach_lora
from flower_split.parties.parts import all_parts, model_cuts
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from tests.support.flower_home import Flower
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config

RATE = 0.5  # of tiny_config's SGD
SCALE = 4.0  # alpha / r of tiny_config


class Paced(LocalGrid):
    """Clients answer in the order in which they were sent out.

    Those of ``slow`` partitions answer only after so many other training replies.
    """

    def __init__(
        self, num_clients: int, config: dict[str, Scalar], slow: dict[int, int] | None = None
    ) -> None:
        super().__init__(num_clients, config)
        self.slow = slow or {}
        self.replies = 0
        self.due: dict[str, int] = {}
        self.before: Callable[[Message], Error | None] = lambda message: None

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        names = list(super().push_messages(messages))
        for name, message in zip(names, messages, strict=True):
            train = message.metadata.message_type == "train"
            wait = self.slow.get(message.metadata.dst_node_id - 100, 0) if train else 0
            self.due[name] = self.replies + wait
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        order = sorted(message_ids, key=lambda name: (self.due[name] > self.replies, self.due[name],
                                                      int(name.rpartition("-")[2])))  # fmt: skip
        for name in order:
            message = self._waiting.pop(name, None)
            if message is None:
                continue
            error = self.before(message)
            reply = (
                Message(error, reply_to=message)
                if error
                else self.client_app(message, self.contexts[message.metadata.dst_node_id])
            )
            reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
            self.replies += message.metadata.message_type == "train"
            return [reply]
        return []


@dataclass(frozen=True)
class Job:
    """Runs tiny asynchronous jobs in this process."""

    root: Path
    model: Path
    data: str

    def config(self, name: str, **changes: Scalar) -> dict[str, Scalar]:
        changes = {
            "strategy__name": "fedbuff",
            "strategy__aggregator": "product-delta",
            "trunk__step_every": "server-round",
            **changes,
        }
        config = tiny_config(self.model, self.data, **changes)
        return {**config, "run-dir": str(self.root / name)}

    def run(self, name: str, grid: Paced | None = None, **changes: Scalar) -> RunDirectory:
        config = self.config(name, **changes)
        run(grid or Paced(int(config["num-clients"]), config), parse_run_config(config))
        return RunDirectory.open(self.root / name)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("parts")
    return make_model(root / "model"), make_data(root / "data", 3)


@pytest.fixture
def job(tmp_path: Path, parts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    return Job(tmp_path, *parts)


def adapters_of(done: RunDirectory) -> dict[str, Tensor]:
    return {**done.read_adapter("client"), **done.read_adapter("trunk")}


def assert_same_bits(one: RunDirectory, two: RunDirectory) -> None:
    first, second = adapters_of(one), adapters_of(two)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def arrivals_of(done: RunDirectory) -> list[tuple[int, int, int]]:
    """(round, partition, staleness), in order of arrival."""
    return [
        (r["server_round"], r["partition_id"], r["staleness"])
        for r in done.metrics("arrival")
        if "order" in r
    ]


def gradient_of(config: RunConfig, partition: int) -> dict[str, Tensor]:
    """By every LoRA weight of the unsplit initial model: of one client's mean token loss."""
    examples = load_client_data(
        config, load_tokenizer(config.model), partition, config.num_clients
    ).train
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype="float32")
    attach_lora(model, model_cuts(config), all_parts(config), seed=config.seed)
    batch = collate(examples, 0)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100).backward()
    return {
        name.replace(".default.", "."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_run_without_staleness_equals_synchronous_rounds_bit_for_bit(job: Job) -> None:
    common: dict[str, Scalar] = {
        "num_clients": 3,
        "num_server_rounds": 3,
        "train__local_steps": 2,
        "lora__bottom__use_dora": True,
        "train__optimizer__name": "adamw",
        "trunk__optimizer__name": "adamw",
        "trunk__optimizer__learning_rate": 0.01,
        "train__optimizer__learning_rate": 0.01,
    }
    asynchronous = job.run(
        "asynchronous", strategy__buffer_size=3, strategy__max_staleness=0, **common
    )
    synchronous = job.run("synchronous", strategy__name="lora-fedavg", **common)
    assert_same_bits(asynchronous, synchronous)
    assert arrivals_of(asynchronous) == [(r, s, 0) for r in (1, 2, 3) for s in (0, 1, 2)]
    losses = [
        [record["eval_loss"] for record in done.metrics("round")]
        for done in (asynchronous, synchronous)
    ]
    assert losses[0] == losses[1]


def test_run_with_a_late_client_equals_the_unsplit_models_of_both_versions(job: Job) -> None:
    """One arrival a round: partition 0 at version 0, then partition 1, also from version 0."""
    done = job.run("run", num_server_rounds=2, strategy__buffer_size=1)
    assert arrivals_of(done) == [(1, 0, 0), (2, 1, 1)]
    first, late = (gradient_of(done.config, partition) for partition in (0, 1))
    factor = 1 / math.sqrt(2)
    found = adapters_of(done)
    for name, gradient in first.items():
        if not name.endswith("lora_B.weight"):
            continue  # B starts at 0, so A has no gradient yet
        if "layers.1." in name or "layers.2." in name:  # the trunk's two steps
            step, flat = (-RATE * (gradient + s * late[name]) for s in (factor, 1.0))
            torch.testing.assert_close(found[name], step, rtol=1e-4, atol=1e-9)
        else:
            module = name.removesuffix(".lora_B.weight")
            a = initial_a(done.config, module).double()
            step, flat = (
                -RATE * SCALE * (gradient + s * late[name]).double() @ a for s in (factor, 1.0)
            )
            pair = found[f"{module}.lora_B.weight"], found[f"{module}.lora_A.weight"]
            delta = SCALE * pair[0].double() @ pair[1].double()
            assert torch.linalg.vector_norm(delta - step) <= 1e-5 * torch.linalg.vector_norm(step)
        # A late client that counted in full would be seen.
        assert torch.linalg.vector_norm(flat - step) > 1e-2 * torch.linalg.vector_norm(step)


def initial_a(config: RunConfig, module: str) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype="float32")
    attach_lora(model, model_cuts(config), all_parts(config), seed=config.seed)
    return dict(model.named_parameters())[f"{module}.lora_A.default.weight"].detach()


def test_run_with_a_slow_client_has_staleness_and_learns(job: Job) -> None:
    config = job.config(
        "run",
        num_clients=3,
        num_server_rounds=6,
        train__local_steps=3,
        strategy__buffer_size=2,
        train__optimizer__learning_rate=0.2,
        trunk__optimizer__learning_rate=0.2,
    )
    grid = Paced(3, config, slow={2: 4})
    run(grid, parse_run_config(config))
    done = RunDirectory.open(job.root / "run")
    arrivals = arrivals_of(done)
    assert max(staleness for *_, staleness in arrivals) >= 2
    assert {partition for _, partition, _ in arrivals} == {0, 1, 2}
    assert [r for r, *_ in arrivals] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    rounds = done.metrics("round")
    losses = [record["eval_loss"] for record in rounds]
    assert losses[-1] < losses[0] - 0.1
    steps = [record["optimizer_steps"] for record in done.metrics("trunk")]
    assert steps == [1] * 6  # one step of the trunk for every buffer
    facts = json.loads((done.path / "summary.json").read_text())["facts"]
    late = [item[2] for item in arrivals]
    assert (facts["arrivals"], facts["largest staleness"]) == (12, max(late))
    assert facts["mean staleness"] == round(sum(late) / 12, 3)
    report = (done.path / "report.md").read_text()
    assert "largest staleness" in report
    assert "the order in which clients come back depends on time" in report


def test_run_in_mode_frozen_serves_late_clients_without_a_step(job: Job) -> None:
    done = job.run("run", mode="frozen", num_server_rounds=3, strategy__buffer_size=1)
    assert max(staleness for *_, staleness in arrivals_of(done)) >= 1
    assert [record["optimizer_steps"] for record in done.metrics("trunk")] == [0, 0, 0]


def test_run_goes_on_when_a_client_dies_once(job: Job) -> None:
    config = job.config("run", num_clients=3, num_server_rounds=3)
    grid = Paced(3, config)
    killed: list[int] = []

    def kill(message: Message) -> Error | None:
        train = message.metadata.message_type == "train"
        if train and message.metadata.dst_node_id == 101 and not killed:
            killed.append(1)
            return Error(ErrorCode.CLIENT_APP_CRASHED, "SIGKILL")
        return None

    grid.before = kill
    run(grid, parse_run_config(config))
    done = RunDirectory.open(job.root / "run")
    assert killed
    (dropped,) = [r for r in done.metrics("arrival") if "dropped" in r]
    assert (dropped["partition_id"], dropped["dropped"]) == (1, "SIGKILL")
    assert 1 in {partition for _, partition, _ in arrivals_of(done)}


def test_run_that_dies_is_resumed_to_the_same_bits_where_nobody_is_late(job: Job) -> None:
    changes: dict[str, Scalar] = {
        "num_server_rounds": 4,
        "strategy__max_staleness": 0,
        "train__local_steps": 2,
        "strategy__server_optimizer": "momentum",
        "round_retries": 0,
    }
    whole = job.run("whole", **changes)
    config = job.config("broken", **changes)
    grid = Paced(2, config)
    trained = 0

    def fail(message: Message) -> Error | None:
        nonlocal trained
        trained += message.metadata.message_type == "train"
        return Error(ErrorCode.CLIENT_APP_CRASHED, "power cut") if trained == 6 else None

    grid.before = fail
    with pytest.raises(FederationError, match="power cut"):
        run(grid, parse_run_config(config))
    broken = RunDirectory.open(job.root / "broken")
    assert [r["server_round"] for r in broken.metrics("round")] == [0, 1, 2]
    again = {**config, "resume": str(broken.path)}
    run(Paced(2, again), parse_run_config(again))
    assert_same_bits(whole, RunDirectory.open(broken.path))
    assert [r["server_round"] for r in broken.metrics("round")] == [0, 1, 2, 3, 4]


def test_run_that_dies_with_late_clients_at_work_goes_on_from_the_committed_round(
    job: Job,
) -> None:
    config = job.config(
        "run", num_clients=3, num_server_rounds=4, round_retries=0, strategy__buffer_size=2
    )
    grid = Paced(3, config, slow={2: 9})
    trained = 0

    def fail(message: Message) -> Error | None:
        nonlocal trained
        trained += message.metadata.message_type == "train"
        return Error(ErrorCode.CLIENT_APP_CRASHED, "power cut") if trained == 6 else None

    grid.before = fail
    with pytest.raises(FederationError, match="power cut"):
        run(grid, parse_run_config(config))
    again = {**config, "resume": str(job.root / "run")}
    run(Paced(3, again), parse_run_config(again))
    done = RunDirectory.open(job.root / "run")
    assert [r["server_round"] for r in done.metrics("round")] == [0, 1, 2, 3, 4]
    assert [r for r, *_ in arrivals_of(done)] == [1, 1, 2, 2, 3, 3, 4, 4]
    dispatches = [r["dispatch"] for r in done.metrics("arrival") if "order" in r]
    assert len(set(dispatches)) == len(dispatches)
    lines = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    first_after = next(r for r in lines if r["kind"] == "arrival" and r["server_round"] == 3)
    assert first_after["staleness"] == 0  # whoever was at work was sent out again


@pytest.mark.slow
def test_flwr_run_with_clients_at_work_all_the_time(
    flower: Flower, parts: tuple[Path, str], tmp_path: Path
) -> None:
    """Under Flower's own simulation: three clients at once, two arrivals a round."""
    job = Job(tmp_path, *parts)
    config = job.config(
        "run",
        num_clients=3,
        num_server_rounds=4,
        train__local_steps=2,
        strategy__buffer_size=2,
        fraction_evaluate=0.0,
    )
    app = make_app(tmp_path / "app", config)
    done = flower.command("flower-split", "run", str(app), timeout=600)
    assert done.returncode == 0, done.stdout
    finished = RunDirectory.open(tmp_path / "run")
    arrivals = arrivals_of(finished)
    assert [r for r, *_ in arrivals] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert max(staleness for *_, staleness in arrivals) >= 1
    assert [record["optimizer_steps"] for record in finished.metrics("trunk")] == [1] * 4
    assert any(tensor.count_nonzero() for tensor in finished.read_adapter("trunk").values())
