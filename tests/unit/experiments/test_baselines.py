"""Baselines against plain PyTorch on the union of the data."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flower_split.client.client import Client
from flower_split.client.model_cache import RunCache
from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.errors import ConfigError
from flower_split.experiments.baselines import run_baseline
from flower_split.lora import attach_lora
from flower_split.parties.parts import all_parts, model_cuts
from flower_split.runs.directory import RunDirectory
from tests.support.tiny_app import make_data, make_model, tiny_config

CLIENTS = 3


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("baselines")
    return make_model(root / "model"), make_data(root / "data", CLIENTS)


def config_of(parts: tuple[Path, str], run: Path, **changes: Scalar) -> RunConfig:
    config = tiny_config(*parts, num_clients=CLIENTS, **changes)
    for side in ("train", "trunk"):
        config[f"{side}.optimizer.name"] = "adamw"
        config[f"{side}.optimizer.learning-rate"] = 0.01
    return parse_run_config({**config, "run-dir": str(run)})


def loss_of(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean over all label tokens of all batches; the loss written out."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:].flatten()
        chosen = labels != -100
        logs = logits[:, :-1].flatten(0, 1).log_softmax(-1)[chosen]
        total = total - logs.gather(1, labels[chosen][:, None]).sum()
        count += int(chosen.sum())
    return total / count


def test_central_is_adamw_on_the_batches_of_all_clients(
    tmp_path: Path, parts: tuple[Path, str]
) -> None:
    changes: dict[str, Scalar] = {"train__batch_size": 2, "train__local_steps": 2}
    config = config_of(
        parts,
        tmp_path / "run",
        num_server_rounds=2,
        train__gradient_accumulation_steps=2,
        **changes,
    )
    run_baseline("central", config)
    run = RunDirectory.open(tmp_path / "run")
    found = {**run.read_adapter("client"), **run.read_adapter("trunk")}

    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype="float32")
    attach_lora(model, model_cuts(config), all_parts(config), seed=config.seed)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.0)
    clients = [Client(RunCache(config), slot, CLIENTS) for slot in range(CLIENTS)]
    for server_round in (1, 2):
        streams = [client.batches(server_round) for client in clients]
        for _ in range(2):
            loss_of(model, [next(stream) for stream in streams for _ in range(2)]).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = {name.replace(".default.", "."): p.detach() for name, p in trained.items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)

    losses = {r["partition_id"]: r for r in run.metrics("evaluation") if r["server_round"] == 2}
    assert sorted(losses) == [0, 1, 2]
    for client in clients:
        with torch.no_grad():
            expected_loss = float(loss_of(model, list(client.eval_batches())))
        found_loss = losses[client.partition_id]["eval_loss"]
        assert found_loss == pytest.approx(expected_loss, rel=1e-4)
    assert sorted(path.name for path in (run.path / "adapters").iterdir()) == [
        "client.safetensors", "trunk.safetensors",
    ]  # fmt: skip


def test_central_of_one_client_is_that_client_alone(
    tmp_path: Path, parts: tuple[Path, str]
) -> None:
    for name in ("central", "alone"):
        config = config_of(parts, tmp_path / name, train__local_steps=2, num_server_rounds=2)
        values = {"num-clients": 1, "data.path": parts[1].replace("{partition_id}", "1")}
        from flower_split.config import resolved_run_config

        run_baseline(name, parse_run_config({**resolved_run_config(config), **values}))
    central, alone = (RunDirectory.open(tmp_path / name).summary() for name in ("central", "alone"))
    assert central["overall"] == alone["overall"]


def test_alone_evaluates_every_client_on_its_own_data(
    tmp_path: Path, parts: tuple[Path, str]
) -> None:
    run_baseline("alone", config_of(parts, tmp_path / "run"))
    run = RunDirectory.open(tmp_path / "run")
    evaluations = [(r["server_round"], r["partition_id"]) for r in run.metrics("evaluation")]
    assert sorted(evaluations) == [(r, slot) for r in (0, 1) for slot in range(CLIENTS)]
    assert [r["partition_id"] for r in run.metrics("step")] == [0, 1, 2]
    overall, notes = run.summary()["overall"], run.summary()["notes"]
    assert isinstance(overall, dict) and overall["federated"] < overall["base"]
    assert isinstance(notes, list) and '"alone"' in str(notes[0])


@pytest.mark.parametrize("name", ["federated", "splitfed-v1", "sequential", "splitfed-v2"])
def test_baseline_in_turns_is_adamw_in_that_order(
    tmp_path: Path, parts: tuple[Path, str], name: str
) -> None:
    config = config_of(parts, tmp_path / "run", num_server_rounds=2, train__batch_size=2)
    run_baseline(name, config)
    run = RunDirectory.open(tmp_path / "run")
    found = {**run.read_adapter("client"), **run.read_adapter("trunk")}

    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype="float32")
    attach_lora(model, model_cuts(config), all_parts(config), seed=config.seed)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    trunk = {n: p for n, p in trained.items() if ".layers.1." in n or ".layers.2." in n}
    own = {n: p for n, p in trained.items() if n not in trunk}

    def adamw(parameters: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.0)

    copies = name in ("federated", "splitfed-v1")  # of the trunk: each client begins from the mean
    restored = [own, trunk] if copies else [own] if name == "splitfed-v2" else []
    shared = adamw(trunk)
    clients = [Client(RunCache(config), slot, CLIENTS) for slot in range(CLIENTS)]
    for server_round in (1, 2):
        start = {n: p.detach().clone() for n, p in trained.items()}
        order = list(range(CLIENTS))
        if name == "splitfed-v2":
            random.Random(f"{config.seed}/{server_round}").shuffle(order)
        sums, total = {n: torch.zeros_like(p) for n, p in trained.items()}, 0
        for slot in order:
            for parameters in restored:
                for n, p in parameters.items():
                    p.data.copy_(start[n])
            batch = next(clients[slot].batches(server_round))
            loss_of(model, [batch]).backward()
            optimizers = [adamw(own), adamw(trunk) if copies else shared]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total += tokens
            for n, p in trained.items():
                sums[n] += tokens * p.detach()
        for parameters in restored:
            for n, p in parameters.items():
                p.data.copy_(sums[n] / total)
    expected = {n.replace(".default.", "."): p.detach() for n, p in trained.items()}
    assert found.keys() == expected.keys()
    for n, tensor in expected.items():
        torch.testing.assert_close(found[n], tensor, rtol=1e-4, atol=1e-5, msg=n)
    assert len(run.metrics("step")) == 2 * CLIENTS
    sent = [r["adapters_up"] for r in run.metrics("bytes")]
    held = trained if name == "federated" else own  # by a client: the trunk's copies do not travel
    assert sent == [4 * sum(p.numel() for p in held.values())] * 2 * CLIENTS


def test_splitfed_v1_computes_what_federated_computes(
    tmp_path: Path, parts: tuple[Path, str]
) -> None:
    runs = []
    for name in ("federated", "splitfed-v1"):
        run_baseline(name, config_of(parts, tmp_path / name, num_server_rounds=2))
        runs.append(RunDirectory.open(tmp_path / name))
    for part in ("client", "trunk"):
        mine, theirs = (run.read_adapter(part) for run in runs)
        assert mine.keys() == theirs.keys() and mine
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert runs[0].summary()["overall"] == runs[1].summary()["overall"]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("federated", {"fraction_train": 0.5}, "the federated baseline.*fraction-train is 0.5"),
        ("sideways", {}, "sideways"),
        ("central", {"fraction_train": 0.5}, "fraction-train is 0.5"),
        ("central", {"train__local_steps": 0, "train__local_epochs": 1}, "local-epochs"),
    ],
)
def test_baseline_that_cannot_be_is_refused(
    tmp_path: Path, parts: tuple[Path, str], name: str, changes: dict[str, Scalar], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run_baseline(name, config_of(parts, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
