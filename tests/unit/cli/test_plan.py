"""``flower-split plan``: what it says against what a real round counts, and against sums by hand."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import LlamaConfig

from flower_split.cli.main import main
from flower_split.cli.plan.command import PlanCommand, client_memory, step_seconds, trunk_memory
from flower_split.cli.plan.dry_run import CLIENT, TRUNK, DryRun, dry_run
from flower_split.cli.plan.speed import probe_flops
from flower_split.cli.plan.wire_bytes import step_bytes
from flower_split.config import RunConfig, Scalar, parse_run_config, resolved_run_config
from flower_split.errors import ConfigError
from flower_split.lora import adapter_state
from tests.acceptance.federation import (
    VOCAB_SIZE,
    federation,
    make_batch,
    make_config,
    write_checkpoint,
)
from tests.support.sampling import sampled
from tests.support.task_runs import make_base
from tests.support.tiny_app import make_app

ROWS, POSITIONS, STEPS = 2, 7, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plan") / "model")


def job(checkpoint: Path, changes: Mapping[str, Scalar]) -> RunConfig:
    config = make_config(checkpoint, local_steps=STEPS, batch_size=ROWS, sequence_length=POSITIONS)
    return parse_run_config({**resolved_run_config(config), **changes})


SETTINGS: Mapping[str, Mapping[str, Scalar]] = {
    "plain": {},
    "bfloat16": {"trunk.wire-dtype": "bfloat16"},
    "bfloat16 gradients": {"trunk.gradient-wire-dtype": "bfloat16"},
    "accumulated": {"train.gradient-accumulation-steps": 3, "train.micro-batches-in-flight": 1},
    "a step a round": {
        "trunk.step-every": "server-round",
        "train.gradient-accumulation-steps": 2,
        "train.micro-batches-in-flight": 1,
    },
    "bfloat16 base": {"model.dtype": "bfloat16"},
    "clipped together": {
        "train.max-grad-norm-over": "model",
        "train.optimizer.max-grad-norm": 1.0,
        "trunk.optimizer.max-grad-norm": 1.0,
    },
}


@pytest.mark.parametrize(
    "name", sampled(SETTINGS, "bfloat16 gradients", "accumulated", "clipped together")
)
def test_bytes_are_those_that_a_real_round_counts(checkpoint: Path, name: str) -> None:
    config = job(checkpoint, SETTINGS[name])
    run = dry_run(config)
    count = STEPS * config.train.gradient_accumulation_steps
    batches = [make_batch(ROWS, [POSITIONS] * ROWS, seed=n) for n in range(count)]
    with federation(config) as parties:
        adapter = adapter_state(parties.client_model(0))
        _, results, _ = parties.train(adapter, {0: batches}, num_steps=STEPS)
    for step in results[0].steps:
        planned = step_bytes(config, run, "test", step.step)
        assert (planned.sent, planned.received) == (step.bytes_sent, step.bytes_received)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> DryRun:
    return dry_run(job(checkpoint, {}))


def test_weights_are_those_of_the_parts_by_hand(checkpoint: Path, plain: DryRun) -> None:
    config, run = job(checkpoint, {}), plain
    # Six layers of q, o (32 x 32), k, v (16 x 32), gate, up, down (48 x 32) and two norms; a tied
    # embedding and a last norm are the client's, as are the layers before 2 and from 4.
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    assert run.parts[TRUNK].base_bytes == 4 * 2 * layer
    assert run.parts[CLIENT].base_bytes == 4 * (4 * layer + VOCAB_SIZE * 32 + 32)
    # LoRA is on all seven projections: r (in + out) values each.
    ends = 2 * (32 + 32) + 2 * (16 + 32) + 3 * (48 + 32)
    assert run.parts[TRUNK].trained_values == 3 * 2 * ends
    assert run.parts[CLIENT].trained_values == 4 * 2 * ends + 2 * 2 * ends
    assert run.hidden_shape == (ROWS, POSITIONS, 32) and run.intermediate_size == 48
    # SGD has no state; weights, the gradient, the adapter that came and the one that goes.
    assert client_memory(config, run).training == 4 * 4 * 6 * 2 * ends
    adam = job(checkpoint, {"train.optimizer.name": "adamw", "trunk.optimizer.name": "adamw"})
    assert client_memory(adam, run).training == 6 * 4 * 6 * 2 * ends


def test_matrix_products_of_the_layers_are_counted(plain: DryRun) -> None:
    products = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    tokens = ROWS * POSITIONS
    # Forward and the gradient of every product's input; LoRA's own and the attention's come on top.
    assert 2 * 2 * products * tokens < plain.parts[TRUNK].flops < 2.2 * 2 * 2 * products * tokens


def test_activations_grow_with_the_batch_and_with_the_clients_that_wait(checkpoint: Path) -> None:
    one, runs = job(checkpoint, {"num-clients": 1, "train.batch-size": 8}), []
    for rows in (8, 16, 24):
        runs.append(dry_run(job(checkpoint, {"train.batch-size": rows})))
    kept = [run.parts[TRUNK].waiting_bytes for run in runs]
    assert kept[2] - kept[1] == kept[1] - kept[0] > 0.7 * kept[0]
    four = job(checkpoint, {"num-clients": 4, "train.batch-size": 8})
    hidden = 4 * 8 * POSITIONS * 32
    more = trunk_memory(four, runs[0]).activations - trunk_memory(one, runs[0]).activations
    assert more == 3 * (kept[0] + 2 * hidden)


def test_seconds_are_by_the_rates_and_the_link(checkpoint: Path, plain: DryRun) -> None:
    config, run = job(checkpoint, {"num-clients": 3}), plain
    command = PlanCommand(
        app=checkpoint, link=8.0, latency=50.0, client_gflops=2.0, trunk_gflops=4.0
    )
    found, moved = (
        step_seconds(config, run, command),
        step_bytes(config, run, "20260101-000000-abcdef-01234567"),
    )
    assert found.client == pytest.approx(run.parts[CLIENT].flops / 2e9)
    assert found.trunk == pytest.approx(3 * run.parts[TRUNK].flops / 4e9)
    assert found.wire == pytest.approx((moved.sent + moved.received) / 1e6 + 2 * 0.05)


def test_forward_only_has_no_way_back(checkpoint: Path, plain: DryRun) -> None:
    forward = dry_run(job(checkpoint, {"mode": "forward-only", "lora.bottom.r": 0}))
    assert forward.parts[TRUNK].flops < 0.6 * plain.parts[TRUNK].flops
    assert forward.parts[TRUNK].trained_bytes == 0


def test_command_prints_a_plan_and_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = str(make_app(tmp_path / "app", resolved_run_config(job(checkpoint, {}))))
    rates = ["--client-gflops", "10", "--trunk-gflops", "100"]
    assert main(["plan", app, *rates]) == 0
    said = capsys.readouterr().out
    assert "micro-batches of 2 x 7 tokens" in said and "rates as given" in said
    assert main(["plan", app, *rates, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wire"]["sent"] > found["wire"]["received"] > 0
    assert main(["plan", app, "--link", "0"]) == 2
    with pytest.raises(ConfigError, match="quantised"):
        dry_run(job(checkpoint, {"model.quantization": "bnb-8bit"}))


def test_weights_are_of_the_dtype_that_the_run_loads(checkpoint: Path, plain: DryRun) -> None:
    half = dry_run(job(checkpoint, {"model.dtype": "bfloat16"}))
    for name in (CLIENT, TRUNK):
        assert 2 * half.parts[name].base_bytes == plain.parts[name].base_bytes
        assert half.parts[name].trained_bytes == plain.parts[name].trained_bytes  # LoRA stays fp32


def test_activations_do_not_hold_the_base_weights(tmp_path: Path) -> None:
    """Of two tokens next to nothing is kept, however wide the layers are."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    wide = LlamaConfig(**sizes, vocab_size=VOCAB_SIZE, num_attention_heads=8)
    wide.save_pretrained(tmp_path)
    run = dry_run(job(tmp_path, {"model.second-cut": 3, "train.sequence-length": 2}))
    part = run.parts[TRUNK]
    assert part.base_bytes == 4 * (4 * 512 * 512 + 3 * 2048 * 512 + 2 * 512)
    assert 0 < part.waiting_bytes < part.base_bytes / 10


TASKS: Mapping[str, list[tuple[int, int]]] = {  # task -> matrices that train whole
    "sequence-classification": [(32, 32), (3, 32)],  # BERT's pooler is part of the head
    "token-classification": [(3, 32)],
    "question-answering": [(2, 32)],
    "masked-lm": [],
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_of_an_encoder_are_planned_with_their_heads(tmp_path: Path, task: str) -> None:
    model = make_base(tmp_path / "base", "bert")
    changes: dict[str, Scalar] = {"model.task": task, "model.first-cut": 1, "model.second-cut": 3}
    changes["model.labels"] = "a, b, c" if "classification" in task else ""
    run = dry_run(job(model, changes))
    assert run.hidden_shape == (ROWS, POSITIONS, 32)
    # Queries, keys, values, the attention's output, both matrices of the MLP, their biases, two norms.
    layer = 4 * (32 * 32 + 32) + 2 * 48 * 32 + 48 + 32 + 4 * 32
    assert run.parts[TRUNK].base_bytes == 4 * 2 * layer
    heads = [
        shape for name, shape in run.trained.items() if ".lora_" not in name and len(shape) > 1
    ]
    assert heads == TASKS[task]


@pytest.mark.parametrize("task", ["seq2seq", "image-classification"])
def test_another_task_is_refused_by_name(checkpoint: Path, task: str) -> None:
    labels = "yes, no" if task == "image-classification" else ""
    with pytest.raises(ConfigError, match=task):
        dry_run(job(checkpoint, {"model.task": task, "model.labels": labels}))


def test_probe_tells_a_rate_and_leaves_the_threads_as_they_are() -> None:
    import torch

    before = torch.get_num_threads()
    assert 1e7 < probe_flops(16, 32, 48, torch.float32, 1) < 1e15
    assert torch.get_num_threads() == before
