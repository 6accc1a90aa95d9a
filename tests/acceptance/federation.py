"""A whole federation without Flower's processes: real trunk server, real gRPC, one thread a client.

The clients' models, the trunk's engine, the training spine and the aggregator are the product's own;
only Flower's message passing is left out, so that a test of arithmetic takes a second.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterUpdate
from flower_split.client.client import trunk_class
from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import (
    LoraConfigs,
    LoraPartConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    TrunkConfig,
)
from flower_split.lora import adapter_state, attach_lora, load_adapter_state, lora_scales
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import all_parts, held_parts, model_cuts
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import RoundPlan, RoundReport
from flower_split.runtime.devices import resolve_device
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.step_ends import finish_rule
from flower_split.split import CutLayers, load_client_model, set_trunk
from flower_split.split.loading.model_source import ModelSource
from flower_split.split.structure.compute_mode import compute_fast
from flower_split.split.structure.stack import find_stack
from flower_split.training.loss import Batch
from flower_split.training.measures import RoundPosition, TrainResult
from flower_split.training.round import train_round
from flower_split.trunk.build import make_engine
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.service.server import TrunkServer

VOCAB_SIZE = 64
TOKEN = "a coordinator token of the tests"
SGD = OptimizerConfig(name="sgd", learning_rate=0.5, max_grad_norm=0.0)


def write_checkpoint(path: Path) -> Path:
    """A tiny Llama of six layers with weights of a size that gives every part a real gradient."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def make_config(path: Path, *, mode: str = "joint", **train: object) -> RunConfig:
    """SGD, one local step, LoRA of different rank and scale on every part."""
    return RunConfig(
        mode=mode,
        num_server_rounds=1,
        model=ModelConfig(name=str(path), first_cut=2, second_cut=4),
        lora=LoraConfigs(
            bottom=LoraPartConfig(r=4, alpha=8.0),
            trunk=LoraPartConfig(r=3, alpha=6.0),
            top=LoraPartConfig(r=2, alpha=2.0),
        ),
        train=TrainConfig(**{"local_steps": 1, "optimizer": SGD, **train}),
        trunk=TrunkConfig(optimizer=SGD, join_timeout=20.0, window_timeout=20.0, call_timeout=30.0),
    )


def make_batch(rows: int, lengths: Sequence[int], seed: int) -> Batch:
    """Right-padded random sequences of the given lengths; the padding has no label."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(1, VOCAB_SIZE, (rows, longest), generator=generator)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": torch.where(mask.bool(), ids, -100),
    }


def perturbed(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """``state`` with B moved away from zero, so that A has a gradient too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sorted(state.items())
    }


class Whole:
    """The unsplit model with the same LoRA: the reference."""

    def __init__(self, config: RunConfig) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            config.model.name, dtype=getattr(torch, config.model.dtype)
        )
        attach_lora(self.model, model_cuts(config), all_parts(config), seed=config.seed)
        self.model.train()

    def load(self, *parts: Mapping[str, Tensor]) -> None:
        load_adapter_state(self.model, {k: v for part in parts for k, v in part.items()})

    def sgd_step(self, batches: Sequence[Batch], rate: float) -> dict[str, Tensor]:
        """One SGD step on the mean token loss over all ``batches`` together."""
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for batch in batches:
            logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
            )
            (loss / tokens).backward()
        torch.optim.SGD(parameters, lr=rate).step()
        return adapter_state(self.model)


class Federation:
    """Clients and a served trunk. Made by :func:`federation`."""

    def __init__(
        self,
        config: RunConfig,
        engine: TrunkEngine,
        address: str,
        cuts: Mapping[int, CutLayers],
    ) -> None:
        self.config = config
        self.cuts = dict(cuts)
        self.engine = engine
        self.address = address
        self.coordinator = TrunkCoordinator(address, TOKEN, timeout=30.0)
        self.models: dict[int, torch.nn.Module] = {}

    def client_model(self, slot: int) -> torch.nn.Module:
        """The slot's own part of the model, with LoRA."""
        if slot not in self.models:
            cuts = self.cuts.get(slot, model_cuts(self.config))
            source = ModelSource.of(self.config.model)
            device = resolve_device(self.config.train.device, "train.device")
            model = load_client_model(source, cuts, torch.nn.Identity(), device=device)
            parts = held_parts(self.config, cuts)
            attach_lora(model, model_cuts(self.config), parts, seed=self.config.seed)
            if self.config.train.compute == "fast":
                compute_fast(model, find_stack(model).layers(model))
            self.models[slot] = model
        return self.models[slot]

    def remote(self, slot: int, mode: str | None = None) -> RemoteTrunk:
        """The slot's connection, with its token of the open round."""
        return trunk_class()(
            self.address,
            token=f"token-{slot}",
            fingerprint=fingerprint(self.config),
            mode=mode or self.config.mode,
            call_timeout=self.config.trunk.call_timeout,
            cuts=self.cuts.get(slot),
        )

    def begin(self, slots: Sequence[int], server_round: int = 1, **changes: object) -> RoundPlan:
        """Open a round on the trunk."""
        plan = RoundPlan(
            experiment="test",
            server_round=server_round,
            attempt=0,
            participants={slot: f"token-{slot}" for slot in slots},
            step_every=StepEvery(self.config.trunk.step_every),
            num_server_rounds=self.config.num_server_rounds,
            join_seconds=20.0,
            window_seconds=20.0,
            finish=finish_rule(self.config),
        )
        plan = replace(plan, **changes)
        self.coordinator.begin_round(plan)
        return plan

    def train(
        self,
        adapter: Mapping[str, Tensor],
        batches: Mapping[int, Sequence[Batch]],
        *,
        order: Sequence[int] | None = None,
        num_steps: int = 1,
        poisoned: Mapping[int, Mapping[str, Tensor]] | None = None,
        quorum: float = 1.0,
        steps_per_round: int = 1,
    ) -> tuple[dict[int, dict[str, Tensor]], dict[int, TrainResult], RoundReport]:
        """One round of all clients at once.

        Args:
            adapter: What everybody begins with, as far as they hold it.
            batches: By slot.
            order: Who starts first.
            num_steps: Optimizer steps of each client.
            poisoned: Slots that begin with another adapter, and whose failure is no error here.
            quorum: Of the round.
            steps_per_round: Places the trunk's learning-rate schedule.
        """
        poisoned = poisoned or {}
        self.failed: dict[int, BaseException] = {}
        self.begin(sorted(batches), quorum=quorum, steps_per_round=steps_per_round)
        for slot in batches:
            self.client_model(slot)
        started = threading.Semaphore(0)

        def run(slot: int) -> tuple[dict[str, Tensor], TrainResult]:
            model = self.client_model(slot)
            start = poisoned.get(slot, adapter)
            load_adapter_state(model, {name: start[name] for name in adapter_state(model)})
            trunk = self.remote(slot)
            set_trunk(model, trunk)
            position = RoundPosition(
                server_round=1, num_server_rounds=1, num_steps=num_steps, partition_id=slot
            )
            try:
                try:
                    trunk.open(num_steps)
                finally:
                    started.release()  # the next one begins even where the round is over already
                result = train_round(model, iter(batches[slot]), self.config, position, trunk)
            finally:
                trunk.close()
            return adapter_state(model), result

        with ThreadPoolExecutor(len(batches)) as pool:
            futures = {}
            for slot in order or sorted(batches):
                futures[slot] = pool.submit(run, slot)
                started.acquire(timeout=20)
            done = {}
            for slot, future in futures.items():
                error = future.exception(timeout=60)
                if error is not None and slot not in poisoned:
                    raise error
                if error is not None:
                    self.failed[slot] = error
                else:
                    done[slot] = future.result()
        report = self.coordinator.prepare_round("test", 1, 0)
        self.coordinator.commit_round("test", 1, 0)
        states = {slot: state for slot, (state, _) in sorted(done.items())}
        return states, {slot: result for slot, (_, result) in sorted(done.items())}, report

    def aggregate(
        self,
        name: str,
        sent: Mapping[str, Tensor],
        returned: Mapping[int, Mapping[str, Tensor]],
        weights: Mapping[int, float],
    ) -> dict[str, Tensor]:
        """The next global adapter."""
        aggregator = AdapterAggregator(name, lora_scales(self.client_model(min(returned))))
        aggregator.init(sent)
        aggregator.aggregate(
            [AdapterUpdate(slot, sent, returned[slot], weights[slot]) for slot in returned]
        )
        return aggregator.distribute()

    def load_trunk(self, state: Mapping[str, Tensor]) -> None:
        """Give the trunk other initial adapter weights."""
        load_adapter_state(self.engine.compute.trunk, state)
        self.engine.keep_as_initial()


@contextmanager
def federation(
    config: RunConfig, cuts: Mapping[int, CutLayers] = MappingProxyType({})
) -> Iterator[Federation]:
    """A served trunk for ``config``; ends with the block.

    Args:
        config: The run's.
        cuts: Slots with cut layers of their own.
    """
    threads = torch.get_num_threads()
    engine = make_engine(config)
    server = TrunkServer(engine, coordinator_token=TOKEN)
    result = Federation(config, engine, f"127.0.0.1:{server.start()}", cuts)
    try:
        yield result
    finally:
        result.coordinator.close()
        server.stop(0.0)
        engine.close()
        torch.set_num_threads(threads)
