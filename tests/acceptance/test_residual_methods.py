"""Methods that change the base, with real clients and a real trunk, against dense fp64 sums."""

from pathlib import Path

import pytest
import torch
from flwr.app import Message
from peft import PeftModel
from transformers import AutoModelForCausalLM

from flower_split.config import ModelConfig
from flower_split.data import eval_batches, load_client_data, load_tokenizer
from flower_split.errors import RoundLost, RunDirectoryError
from flower_split.results.export import export_adapter
from flower_split.results.generation import open_generator
from flower_split.training.loss import evaluate
from tests.support.local_grid import TrunkHere
from tests.support.recording import (
    CLIENTS,
    ROUNDS,
    Job,
    Outcome,
    State,
    arrays,
    assert_same_end,
    fail_commit,
)
from tests.support.tiny_app import make_data, make_model

SCALE = 4.0  # alpha 16, rank 4


@pytest.fixture
def job(tmp_path: Path, parts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
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
            change = dense_change(arrays(message, "flower-split.base-change"))
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
    starts = [arrays(pairs[0][0], "arrays") for _, pairs in sorted(outcome.trained.items())]
    begun = [any(bool(delta.any()) for delta in dense(state).values()) for state in starts]
    assert begun == [False, *[aggregator == "fedex-lora"] * (ROUNDS - 1)]  # flora starts afresh
    for one, two in zip(starts, starts[1:], strict=False):
        assert not any(torch.equal(one[n], two[n]) for n in one if n.endswith("lora_A.weight"))
    _, reply = outcome.trained[ROUNDS][0]
    assert list(reply.content.array_records) == ["arrays"]
    assert not any("base_" in name for name in arrays(reply, "arrays"))


def test_run_with_fedit_is_not_the_mean_of_the_clients(job: Job) -> None:
    assert drift(job.run("run", "fedit")) > 1e-2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("aggregator", ["flora", "fedex-lora"])
def test_exported_adapter_has_the_held_out_loss_that_the_clients_reported(
    job: Job, aggregator: str, tmp_path: Path
) -> None:
    done = job.run("run", aggregator).directory
    export_adapter(done.path, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(str(job.model))
    tokenizer = load_tokenizer(done.config.model)
    reported = {
        int(str(record["partition_id"])): float(str(record["loss_sum"]))
        for record in done.metrics("evaluation")
        if record["server_round"] == ROUNDS
    }
    model = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    for partition in range(CLIENTS):
        data = load_client_data(done.config, tokenizer, partition, CLIENTS)
        batches = eval_batches(data.evaluate, done.config.train.batch_size, 0)
        found = evaluate(
            model.get_base_model(), batches, torch.device("cpu"), ModelConfig()
        ).loss_sum
        assert found == pytest.approx(reported[partition], rel=1e-5)
    ids = torch.arange(3, 12)[None]
    with open_generator(done.path) as generator, torch.no_grad():
        said = generator.model(input_ids=ids).logits
        exported = model.get_base_model().eval()(input_ids=ids).logits
    torch.testing.assert_close(said, exported, rtol=1e-5, atol=1e-5)
    change = done.read_adapter("base")
    done.write_adapter("base", {name: tensor * 0 for name, tensor in change.items()})
    export_adapter(done.path, tmp_path / "without")
    without = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(job.model)), str(tmp_path / "without")
    )
    data = load_client_data(done.config, tokenizer, 0, CLIENTS)
    batches = eval_batches(data.evaluate, done.config.train.batch_size, 0)
    lost = evaluate(without.get_base_model(), batches, torch.device("cpu"), ModelConfig()).loss_sum
    assert abs(lost - reported[0]) > 1e-3 * reported[0]


@pytest.mark.parametrize(
    "aggregator", ["flora", pytest.param("fedex-lora", marks=pytest.mark.slow)]
)
def test_resumed_run_whose_method_changes_the_base_ends_on_the_same_bits(
    job: Job, aggregator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = job.run("calm", aggregator)
    failed = fail_commit(monkeypatch, 2, RunDirectoryError("the disk is full"))
    with pytest.raises(RunDirectoryError, match="the disk is full"):
        job.run("killed", aggregator)
    assert failed == [2]
    config = {**job.config("killed", aggregator), "resume": str(job.root / "killed")}
    resumed = job.go("killed", config)
    assert sorted(resumed.trained) == [2, 3]
    assert_same_end(calm.directory, resumed.directory, ("client", "base", "trunk"))


def test_round_that_was_lost_leaves_nothing_in_the_base(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = job.run("calm", "fedex-lora")
    failed = fail_commit(monkeypatch, 1, RoundLost("the connection was lost"))
    again = job.run("again", "fedex-lora")
    assert failed == [1] and len(again.trained[1]) == 2 * CLIENTS
    assert_same_end(calm.directory, again.directory, ("client", "base", "trunk"))
