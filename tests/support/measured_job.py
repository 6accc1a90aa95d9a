"""Measure what ``flower-split plan`` predicts: a trunk and its clients, each a process of its own.

Usage: ``python -m tests.support.measured_job FOLDER``; prints JSON. Every process first trains a job of
a few tokens, so that code and libraries are in memory, and counts what comes on top of that.
"""

import gc
import json
import multiprocessing
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import (
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    TrunkConfig,
)
from flower_split.lora import attach_lora
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import held_parts, model_cuts
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import RoundPlan
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.split import load_client_model, set_trunk
from flower_split.split.loading.model_source import ModelSource
from flower_split.training.measures import RoundPosition
from flower_split.training.round import train_round
from flower_split.trunk.build import make_engine
from flower_split.trunk.service.server import TrunkServer

TOKEN = "a coordinator token of the tests"
STEPS, CLIENTS = 2, 1
EXPERIMENT = "plan"


def job(folder: Path, batch: int = 8, sequence: int = 256) -> RunConfig:
    """A Llama with 9 million weights, cut after one layer and before the last."""
    path = folder / "model"
    if not path.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(path)
    optimizer = OptimizerConfig(name="adamw", learning_rate=1e-3)
    return RunConfig(
        num_clients=CLIENTS,
        model=ModelConfig(name=str(path), first_cut=1, second_cut=5),
        train=TrainConfig(
            local_steps=STEPS, batch_size=batch, sequence_length=sequence, optimizer=optimizer
        ),
        trunk=TrunkConfig(optimizer=optimizer, transport="grpc", device="cpu"),
    )


def measure(folder: Path) -> dict[str, object]:
    """Return peaks over the tiny job in bytes, by party, and each step's bytes on the wire."""
    real = job(folder)
    jobs = [replace(real, train=replace(real.train, batch_size=2, sequence_length=8)), real]
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    trunk = context.Process(target=_serve, args=(theirs, jobs), daemon=True)
    trunk.start()
    clients = []
    for slot in range(CLIENTS):
        here, there = context.Pipe()
        process = context.Process(target=_train, args=(there, slot, jobs), daemon=True)
        process.start()
        clients.append(here)
    found: list[dict[str, object]] = []
    for number, config in enumerate(jobs):
        port = mine.recv()
        coordinator = TrunkCoordinator(f"127.0.0.1:{port}", TOKEN)
        coordinator.begin_round(
            RoundPlan(
                experiment=EXPERIMENT,
                server_round=1,
                attempt=0,
                participants={slot: _token(slot) for slot in range(CLIENTS)},
                step_every=StepEvery(config.trunk.step_every),
                steps_per_round=STEPS,
                num_server_rounds=1,
                join_seconds=300.0,
                window_seconds=300.0,
            )
        )
        for link in clients:
            link.send(port)
        found = [link.recv() for link in clients]
        coordinator.prepare_round(EXPERIMENT, 1, 0)
        coordinator.commit_round(EXPERIMENT, 1, 0)
        coordinator.close()
        mine.send(number)
    peak = mine.recv()
    trunk.join(30)
    return {"client": found[0]["peak"], "trunk": peak, "steps": found[0]["steps"]}


def _token(slot: int) -> str:
    return f"the token of slot {slot}"


def _serve(link: Connection, jobs: list[RunConfig]) -> None:
    """Serve one job after the other; the last one's peak goes to the parent."""
    grown: Callable[[], int] = int
    for config in jobs:
        start = _anonymous()
        engine = make_engine(config)
        server = TrunkServer(engine, coordinator_token=TOKEN)
        grown = _growth(start)
        link.send(server.start())
        link.recv()
        server.stop(0.0)
        engine.close()
        peak = grown()
        del engine, server
        gc.collect()
    link.send(peak)


def _train(link: Connection, slot: int, jobs: list[RunConfig]) -> None:
    """Train one job after the other; each one's measures go to the parent."""
    for config in jobs:
        port = link.recv()
        torch.set_num_threads(1)
        start = _anonymous()
        cuts = model_cuts(config)
        model = load_client_model(ModelSource.of(config.model), cuts, torch.nn.Identity())
        attach_lora(model, cuts, held_parts(config, cuts), seed=config.seed)
        grown = _growth(start)
        trunk = RemoteTrunk(
            f"127.0.0.1:{port}",
            token=_token(slot),
            fingerprint=fingerprint(config),
            mode=config.mode,
            call_timeout=300.0,
        )
        set_trunk(model, trunk)
        trunk.open(STEPS)
        shape = config.train.batch_size, config.train.sequence_length
        rows = torch.arange(shape[0] * shape[1]).reshape(shape) % 8000
        mask = torch.ones_like(rows)
        mask[0, -1] = 0  # with nothing padded, transformers would leave the mask out
        labels = torch.where(mask.bool(), rows, -100)
        batch = {"input_ids": rows, "attention_mask": mask, "labels": labels}
        position = RoundPosition(
            server_round=1, num_server_rounds=1, num_steps=STEPS, partition_id=slot
        )
        result = train_round(model, iter([batch] * STEPS), config, position, trunk)
        trunk.close()
        steps = [[step.bytes_sent, step.bytes_received] for step in result.steps]
        link.send({"peak": grown(), "steps": steps})
        del model, trunk, result
        gc.collect()


def _anonymous() -> int:
    """Return the resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _growth(start: int) -> Callable[[], int]:
    """Forget this process's peak, and return what tells the next one, over ``start``."""
    Path("/proc/self/clear_refs").write_text("5")

    def grown() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        [line] = [line for line in lines if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024 - start

    return grown


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
