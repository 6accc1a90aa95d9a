"""Real runs: `flwr run` in an isolated Flower, with tiny models and data."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flower_split.config import RunConfig, Scalar
from flower_split.data import load_client_data, load_tokenizer
from flower_split.data.batches import collate
from flower_split.lora import adapter_state, attach_lora
from flower_split.parties.parts import all_parts, model_cuts
from flower_split.results.export import export_adapter
from flower_split.runs.directory import RunDirectory
from flower_split.server.federation.handshake import federation_config
from tests.support.flower_home import Flower
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config


@dataclass(frozen=True)
class Tiny:
    """What the runs of this file share."""

    model: Path
    data: str
    root: Path

    def config(self, run: str, **changes: Scalar) -> dict[str, Scalar]:
        """The config of one run, whose directory is ``run``."""
        config = tiny_config(self.model, self.data, **changes)
        return {**config, "run-dir": str(self.root / run)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    return Tiny(make_model(root / "model"), make_data(root / "data", 3), root)


def central_step(config: RunConfig, num_partitions: int) -> dict[str, Tensor]:
    """One SGD step of the unsplit model on the union of all clients' training data."""
    tokenizer = load_tokenizer(config.model)
    examples = [
        example
        for partition in range(num_partitions)
        for example in load_client_data(config, tokenizer, partition, num_partitions).train
    ]
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype="float32")
    attach_lora(model, model_cuts(config), all_parts(config), seed=config.seed)
    batch = collate(examples, 0)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="mean"
    )
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter -= config.train.optimizer.learning_rate * parameter.grad
    return adapter_state(model)


def adapters_of(run: RunDirectory) -> dict[str, Tensor]:
    return {**run.read_adapter("client"), **run.read_adapter("trunk")}


def digest(state: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def finished(flower: Flower, tiny: Tiny) -> RunDirectory:
    """One round of one step over three clients, with the baseline; checked by several tests."""
    config = tiny.config("central", num_clients=3, local_only_baseline=True)
    app = make_app(tiny.root / "app-central", config)
    done = flower.command("flower-split", "run", str(app))
    assert done.returncode == 0, done.stdout
    assert "round 1/1 done" in done.stdout and "all clients" in done.stdout
    assert "ClientAppActor" not in done.stdout  # only this package's lines, without --stream
    return RunDirectory.open(tiny.root / "central")


def test_run_of_one_sgd_step_equals_one_step_of_the_unsplit_model_on_the_union(
    finished: RunDirectory,
) -> None:
    found, expected = adapters_of(finished), central_step(finished.config, 3)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
        if name.endswith("lora_B.weight"):
            assert found[name].abs().max() > 0, name


def test_run_records_steps_evaluations_and_the_baseline(finished: RunDirectory) -> None:
    steps = finished.metrics("step")
    assert [(s["partition_id"], s["step"]) for s in steps] == [(p, 0) for p in range(3)]
    tokens = [s["num_tokens"] for s in steps]
    assert len(set(tokens)) == 3  # or weighting by tokens would prove nothing
    evaluations = finished.metrics("evaluation")
    federated = [e for e in evaluations if "local_only" not in e]
    assert [(e["server_round"], e["partition_id"]) for e in federated] == [
        (r, p) for r in (0, 1) for p in range(3)
    ]
    alone = [(e["trained_by"], e["partition_id"]) for e in evaluations if "local_only" in e]
    assert sorted(alone) == [(a, b) for a in range(3) for b in range(3)]
    assert (finished.path / "report.md").is_file()
    overall = finished.summary()["overall"]
    assert isinstance(overall, dict)
    assert overall["federated"] < overall["base"]


def test_run_exports_an_adapter_with_the_unsplit_names(
    finished: RunDirectory, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    out = export_adapter(finished.path, tmp_path / "adapter")
    exported = load_file(Path(out) / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.") for name in exported}
    assert names == adapters_of(finished).keys()


@pytest.mark.slow
def test_run_again_in_another_order_ends_on_the_same_adapters(
    flower: Flower, tiny: Tiny, finished: RunDirectory
) -> None:
    # With one local step a window per round holds what a window per step holds; but here the
    # actors are others, and the clients arrive in whatever order these make.
    config = tiny.config("again", num_clients=3, trunk__step_every="server-round")
    app = make_app(tiny.root / "app-again", config)
    outcome = flower.run(
        app, {}, "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=3"
    )
    assert outcome.status == "finished:completed", outcome.output
    again = RunDirectory.open(tiny.root / "again")
    assert digest(adapters_of(again)) == digest(adapters_of(finished))


@pytest.mark.slow  # the same without a SuperLink: test_local_runs.py
def test_flower_split_run_of_a_job_that_fails_exits_with_1_and_one_paragraph(
    flower: Flower, tiny: Tiny
) -> None:
    data = make_data(tiny.root / "broken", 2)
    Path(data.replace("{partition_id}", "1")).write_text("{no json\n")
    config = {**tiny.config("broken-run"), "data.path": data}
    app = make_app(tiny.root / "app-broken", config)
    done = flower.command("flower-split", "run", str(app))
    assert done.returncode == 1, done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("flower-split: run ")
    assert "line 1" in last and "1.jsonl" in last


@pytest.mark.slow
def test_run_with_too_few_clients_at_once_fails_at_once_with_the_line_to_use(
    flower: Flower, tiny: Tiny
) -> None:
    app = make_app(tiny.root / "app-small", tiny.config("small"))
    outcome = flower.run(
        app, {}, "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=1"
    )
    assert outcome.status == "finished:failed"
    assert federation_config(2) in outcome.details
    assert "local-step" in outcome.details
    assert not (tiny.root / "small" / "summary.json").exists()
