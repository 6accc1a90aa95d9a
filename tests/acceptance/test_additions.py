"""A run with the app's own evaluation and callbacks, and runs that end before their last round."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import Result
from torch import Tensor
from transformers import AutoModelForCausalLM

from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.data import load_client_data, load_tokenizer
from flower_split.errors import ConfigError
from flower_split.lora import attach_lora
from flower_split.parties.parts import all_parts, model_cuts
from flower_split.runs.directory import RunDirectory
from flower_split.server.additions import Additions, EndedRound, GlobalModel, RunCallback
from flower_split.server.app import make_server_app, run
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_data, make_model, tiny_config

CLIENTS = 2


@dataclass
class Job:
    root: Path
    model: Path
    data: str

    def config(self, name: str, **changes: Scalar) -> dict[str, Scalar]:
        config = tiny_config(self.model, self.data, **changes)
        every_round = {"trunk.step-every": "server-round", "run-dir": str(self.root / name)}
        return {**every_round, **config}

    def run(
        self, name: str, additions: Additions = Additions(), **changes: Scalar
    ) -> tuple[RunDirectory, Result]:
        config = self.config(name, **changes)
        result = run(LocalGrid(CLIENTS, config), parse_run_config(config), None, additions)
        return RunDirectory.open(self.root / name), result


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("parts")
    return make_model(root / "model"), make_data(root / "data", CLIENTS)


@pytest.fixture
def job(tmp_path: Path, parts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    return Job(tmp_path, *parts)


def whole_loss(model: GlobalModel) -> float:
    """The unsplit model's mean loss on everybody's held-out tokens, one sequence at a time."""
    config = model.config
    whole = AutoModelForCausalLM.from_pretrained(config.model.name, dtype="float32")
    attach_lora(whole, model_cuts(config), all_parts(config), seed=config.seed)
    model.load_into(whole)
    tokenizer, total, tokens = load_tokenizer(config.model), 0.0, 0
    for partition_id in range(CLIENTS):
        for example in load_client_data(config, tokenizer, partition_id, CLIENTS).evaluate:
            with torch.no_grad():
                logits = whole(torch.tensor([example.input_ids])).logits[0, :-1]
            labels = torch.tensor(example.labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            tokens += int((labels != -100).sum())
    return total / tokens


@dataclass
class Watch(RunCallback):
    """Notes every hook, and stops after a round."""

    stops_after: int = -1
    calls: list[str] = field(default_factory=list)
    ended: list[EndedRound] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    def round_started(self, server_round: int, config: RunConfig) -> None:
        self.calls.append(f"started {server_round}")

    def round_ended(self, ended: EndedRound) -> str | None:
        self.calls.append(f"ended {ended.server_round}")
        self.ended.append(ended)
        return "it is good enough." if ended.server_round == self.stops_after else None

    def run_ended(self, result: Result) -> None:
        self.calls.append("run ended")
        self.results.append(result)


def test_central_evaluation_is_that_of_the_unsplit_model_and_reaches_metrics_and_history(
    job: Job,
) -> None:
    trunks: list[Mapping[str, Tensor]] = []

    def evaluate(model: GlobalModel) -> Mapping[str, float] | None:
        trunks.append(model.trunk_adapter)
        return {"loss": whole_loss(model)} if model.server_round != 1 else None

    watch = Watch()
    additions = Additions(evaluate_fn=evaluate, callbacks=[watch])
    done, result = job.run("run", additions, num_server_rounds=2)
    measured = {r["server_round"]: r for r in done.metrics("central")}
    federated = {r["server_round"]: r["eval_loss"] for r in done.metrics("round")}
    assert measured.keys() == {0, 2}  # after round 1 it measured nothing
    for server_round, record in measured.items():
        assert record["metrics"] == {"loss": pytest.approx(federated[server_round], rel=1e-5)}
    history = {number: dict(m) for number, m in result.evaluate_metrics_serverapp.items()}
    assert history == {number: record["metrics"] for number, record in measured.items()}
    assert result.train_metrics_clientapp.keys() == {1, 2}
    assert result.evaluate_metrics_clientapp.keys() == {0, 1, 2}
    # The adapters of the last round are those that the run wrote, and they moved every round.
    last = watch.ended[-1].model
    for found, part in ((last.client_adapter, "client"), (trunks[-1], "trunk")):
        written = done.read_adapter(part)
        assert found.keys() == written.keys()
        assert all(torch.equal(found[name], written[name]) for name in written)
    for before, after in zip(trunks, trunks[1:], strict=False):
        assert any(not torch.equal(before[name], after[name]) for name in before)
    assert watch.calls == [
        *("ended 0", "started 1", "ended 1", "started 2", "ended 2", "run ended")
    ]
    assert watch.results == [result]
    zero, _, two = watch.ended
    assert zero.train_loss is None and zero.train_metrics is None and zero.eval_loss == federated[0]
    assert two.central == measured[2]["metrics"] and two.train_metrics is not None
    assert two.train_loss == done.metrics("round")[2]["train_loss"]


def test_a_callback_stops_the_run_and_everybody_evaluates_its_last_round(job: Job) -> None:
    first, second = Watch(stops_after=1), Watch()
    additions = Additions(callbacks=[first, second])
    done, _ = job.run(
        "run", additions, num_server_rounds=4, evaluate_every=4, fraction_evaluate=0.5
    )
    assert [r["server_round"] for r in done.metrics("round")] == [0, 1]
    assert done.metrics("round")[1]["evaluated"] == [0, 1]
    assert second.calls == ["ended 0", "started 1", "ended 1", "run ended"]
    summary = done.summary()
    assert summary["notes"] == ["The run stopped after round 1 of 4: it is good enough."]
    assert isinstance(summary["facts"], dict) and summary["facts"]["server rounds"] == 1
    assert isinstance(summary["clients"], list) and len(summary["clients"]) == 2
    shorter, _ = job.run("shorter", num_server_rounds=1)  # which trains the same round
    for part in ("client", "trunk"):
        one, other = done.read_adapter(part), shorter.read_adapter(part)
        assert all(torch.equal(one[name], other[name]) for name in one)


STOPPING: dict[str, Scalar] = {
    "early_stopping__metric": "central.score",
    "early_stopping__goal": "max",
    "early_stopping__patience": 2,
}


def test_early_stopping_ends_the_run_and_a_resumed_one_stays_at_its_end(job: Job) -> None:
    scores = {0: 1.0, 1: 3.0, 2: 2.0, 3: 3.0}

    def evaluate(model: GlobalModel) -> Mapping[str, float]:
        return {"score": scores.get(model.server_round, 9.0)}

    additions = Additions(evaluate_fn=evaluate)
    done, _ = job.run("run", additions, num_server_rounds=6, **STOPPING)
    assert [r["server_round"] for r in done.metrics("round")] == [0, 1, 2, 3]
    [note] = done.summary()["notes"]  # type: ignore[misc]
    assert str(note).startswith(
        "The run stopped after round 3 of 6: central.score has not improved"
    )

    before = done.read_adapter("client")
    job.run("run", additions, num_server_rounds=6, **STOPPING, resume=str(done.path))
    assert [r["server_round"] for r in done.metrics("round")] == [0, 1, 2, 3]
    assert all(torch.equal(before[name], v) for name, v in done.read_adapter("client").items())

    patient = {**STOPPING, "early_stopping__patience": 5}
    job.run("run", additions, num_server_rounds=6, **patient, resume=str(done.path))
    assert [r["server_round"] for r in done.metrics("round")] == [0, 1, 2, 3, 4, 5, 6]
    assert done.summary()["notes"] == []


@pytest.mark.parametrize("returned", [{"score": "high"}, {"other": 1.0}])
def test_an_evaluation_of_another_form_is_an_error_that_names_it(
    job: Job, returned: dict[str, float]
) -> None:
    additions = Additions(evaluate_fn=lambda model: returned)
    with pytest.raises(ConfigError, match="score|evaluate_fn returned other"):
        job.run("run", additions, num_server_rounds=2, **STOPPING)


def test_early_stopping_by_what_nobody_measures_is_refused_before_anything_starts(
    job: Job,
) -> None:
    with pytest.raises(ConfigError, match=r"no evaluate_fn. Make it with make_server_app"):
        job.run("run", **STOPPING)
    assert not (job.root / "run").exists()


def test_an_asynchronous_run_stops_early_too(job: Job) -> None:
    watch = Watch(stops_after=2)
    done, result = job.run(
        "run",
        Additions(callbacks=[watch], evaluate_fn=lambda model: {"names": len(model.trunk_adapter)}),
        num_server_rounds=5,
        strategy__name="fedbuff",
        strategy__aggregator="product-delta",
        strategy__buffer_size=1,
    )
    assert [r["server_round"] for r in done.metrics("round")] == [0, 1, 2]
    assert watch.calls[-2:] == ["ended 2", "run ended"]
    counts = {m["names"] for m in result.evaluate_metrics_serverapp.values()}
    assert len(counts) == 1 and min(counts) > 0


def test_make_server_app_hands_both_on(job: Job) -> None:
    watch = Watch()
    config = job.config("run")
    app: ServerApp = make_server_app(evaluate_fn=lambda model: {"one": 1}, callbacks=[watch])
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    app(LocalGrid(CLIENTS, config), context)
    assert watch.calls == ["ended 0", "started 1", "ended 1", "run ended"]
    assert [dict(m) for m in watch.results[0].evaluate_metrics_serverapp.values()] == [
        {"one": 1}
    ] * 2
