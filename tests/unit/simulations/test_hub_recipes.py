"""``simulations/hub-recipes``: every recipe is a run config that fits its model; the page has its plan."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoModel

from flower_split.cli.app_config import load_app
from flower_split.cli.overrides import parse_overrides
from flower_split.cli.plan.dry_run import dry_run
from flower_split.cli.plan.wire_bytes import experiment_name, step_bytes
from flower_split.config import Scalar, parse_run_config, resolved_run_config
from flower_split.config.combinations import check_named_strategy
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from tests.support.documentation import ROOT, blocks
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.task_runs import WORDS, make_base

FOLDER = ROOT / "simulations" / "hub-recipes"
PAGE = ROOT / "docs" / "how-to" / "hub-models.md"
APP = ROOT / "simulations" / "quickstart"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.toml"))
SMALL = ("finance-qwen2.5-0.5b", "news-bert")
# Weights of the published checkpoints, less the output embedding where it is not tied.
WEIGHTS = {
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.3": 7_248_023_552 - 32768 * 4096,
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "SmolLM2-1.7B-Instruct": 1_711_376_384,
    "bert-base-uncased": 109_482_240,
}


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    """The folder's script."""
    spec = importlib.util.spec_from_file_location("hub_recipes_plan", FOLDER / "plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def overrides(name: str) -> dict[str, Scalar]:
    return parse_overrides([str(FOLDER / f"{name}.toml")])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_a_run_config_of_the_quick_start_that_fits_its_model(name: str) -> None:
    app = load_app(APP)
    config = app.config(overrides(name))
    check_named_strategy(config)
    assert config.data.source == "hub" and config.data.dataset.count("/") == 1
    size = json.loads(
        (FOLDER / "models" / config.model.name.split("/")[1] / "config.json").read_text()
    )
    assert 0 < config.model.first_cut < config.model.second_cut < size["num_hidden_layers"]
    assert config.train.sequence_length <= size["max_position_embeddings"]


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "news-bert"])
def test_recipe_has_what_flowertune_publishes(name: str) -> None:
    config = load_app(APP).config(overrides(name))
    clients = {"medical": 20, "finance": 50}[name.split("-")[0]]
    assert (config.num_clients, config.num_server_rounds, config.fraction_train) == (
        clients,
        200,
        0.1,
    )
    for part in (config.lora.bottom, config.lora.trunk, config.lora.top):
        assert (part.r, part.alpha, part.dropout) == (32, 64.0, 0.075)
    train = config.train
    assert train.batch_size * train.gradient_accumulation_steps == 16
    assert (train.local_steps, train.sequence_length, config.data.partitioner) == (10, 512, "iid")
    for optimizer in (train.optimizer, config.trunk.optimizer):
        assert (optimizer.name, optimizer.learning_rate) == ("adamw", 5e-5)
        assert (optimizer.schedule, optimizer.max_grad_norm) == ("cosine", 1.0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_sizes_are_those_of_the_published_checkpoints(name: str) -> None:
    config = AutoConfig.from_pretrained(FOLDER / "models" / name)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == WEIGHTS[name]


def test_page_has_every_recipe_with_its_command_and_its_row(plan: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    commands = "".join(block.text for block in blocks("bash", [PAGE]))
    assert plan.line(plan.HEADER) in text
    run_recipe = (
        "flower-split run simulations/quickstart --local --run-config simulations/hub-recipes"
    )
    for name in RECIPES:
        assert f"{run_recipe}/{name}.toml" in commands
        assert f"\n| `{name}` | " in text


@pytest.mark.parametrize("name", SMALL)
def test_page_has_the_row_that_the_command_prints(
    plan: ModuleType, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main([name]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and printed[2].startswith(f"| `{name}` |")
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line.startswith(f"| `{name}` | ")] == [printed[2]]


@pytest.fixture
def trunk_in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    yield


def small(
    tmp_path: Path, name: str, family: str, rows: list[dict[str, object]]
) -> dict[str, Scalar]:
    """A recipe with a model of four layers and a local file in the place of what the hub has."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **resolved_run_config(load_app(APP).config({})),
        **overrides(name),
        "model.name": str(make_base(tmp_path / "base", family)),
        "model.first-cut": 1,
        "model.second-cut": 3,
        "data.dataset": str(data),
        "data.eval-fraction": 0.2,
        "num-clients": 2,
        "fraction-train": 0.5,  # one client at a time: both are in this process
        "fraction-evaluate": 1.0,
        "num-server-rounds": 2,
        "evaluate-every": 2,
        "train.local-steps": 2,
        "train.device": "cpu",
        "trunk.device": "cpu",
        "report": "",
        "run-dir": str(tmp_path / "run"),
    }


@pytest.mark.filterwarnings("ignore")  # of libraries, on models this small
@pytest.mark.usefixtures("trunk_in_this_process")
def test_flowertune_recipe_trains_on_records_like_the_published_ones(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"instruction": "sun moon", "input": f"{a} {b}", "output": f"{b} {a}"}
        for a in WORDS
        for b in WORDS
        if a < b
    ]
    rows[3]["output"] = ""  # is skipped, and counted
    config = small(tmp_path, "medical-qwen2.5-1.5b", "llama", rows)
    config |= {"train.sequence-length": 32, "data.deduplicate": "exact"}
    run(LocalGrid(2, config), parse_run_config(config))
    done = RunDirectory.open(tmp_path / "run")
    losses = [record["loss"] for record in done.metrics("step")]
    assert len(losses) == 4 and all(isinstance(loss, float) and loss > 0 for loss in losses)
    assert "1 bad records were left out" in str(done.summary()["notes"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("trunk_in_this_process")
def test_encoder_recipe_sends_the_bytes_that_are_planned(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": f"{a} {b} {c}", "label": index % 4}
        for index, (a, b, c) in enumerate(
            (a, b, c) for a in WORDS[:8] for b in WORDS[:8] for c in WORDS[:4]
        )
    ]
    config = small(tmp_path, "news-bert", "bert", rows)
    config |= {"train.sequence-length": 5, "train.batch-size": 4}  # [CLS], three words, [SEP]
    run(LocalGrid(2, config), parse_run_config(config))
    steps = RunDirectory.open(tmp_path / "run").metrics("step")
    made = parse_run_config(config)
    planned = step_bytes(made, dry_run(made), experiment_name(made), 0)
    assert planned.received == steps[0]["bytes_received"]
    assert planned.sent - 2 <= int(str(steps[0]["bytes_sent"])) <= planned.sent
