"""Print how far a federated round is from training the unsplit model on everybody's data.

For each setting, four clients with unequal numbers of tokens train a tiny model for one round over
loopback gRPC, with the product's own client loop, trunk and aggregation. Beside it the unsplit model
takes the same optimizer steps on all their batches together, clipped by one norm over all its LoRA.
Printed is ‖federated − central‖ / ‖central − start‖ over ΔW = scale · B A of the clients' layers and of
the trunk's. It takes seconds:

    python simulations/equality.py
"""

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterUpdate
from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import (
    LoraConfigs,
    LoraPartConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StrategyConfig,
    TrainConfig,
    TrunkConfig,
)
from flower_split.lora import adapter_state, attach_lora, load_adapter_state, lora_scales
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import all_parts, client_parts, model_cuts
from flower_split.protocol.values import RoundPlan
from flower_split.runtime.logs import quiet_libraries
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.step_ends import finish_rule
from flower_split.split import load_client_model, load_whole_model, set_trunk
from flower_split.split.loading.model_source import ModelSource
from flower_split.training.loss import Batch, causal_lm_loss, count_label_tokens
from flower_split.training.measures import RoundPosition
from flower_split.training.optimizers import LearningRate, make_optimizer
from flower_split.training.round import train_round
from flower_split.trunk.build import make_engine
from flower_split.trunk.service.server import TrunkServer

VOCAB_SIZE = 64
LENGTHS = ([3], [9, 4], [12, 12, 2, 7], [20, 18, 20])  # tokens of each row, by client
STEPS = (1, 5)  # optimizer steps of the round
PARTS = ("clients", "trunk")
TOKEN = "of this process alone"
NEGLIGIBLE = 1e-5  # rounding in fp32

SGD = OptimizerConfig(name="sgd", learning_rate=0.1, max_grad_norm=0.0)
CLIPPED = replace(SGD, max_grad_norm=1.0)
ADAMW = OptimizerConfig()  # the default: AdamW, 2e-3, clipped to 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One row of the table."""

    name: str
    optimizer: OptimizerConfig
    aggregator: str = "fedit"
    over: str = "part"  # train.max-grad-norm-over
    sync: str = "rounds"  # train.sync
    from_zero: bool = False  # B = 0, as LoRA begins; else away from it, as after some rounds


SETTINGS = (
    Setting(name="SGD, no clipping, `fedit`", optimizer=SGD),
    Setting(
        name="SGD, no clipping, `product-delta`, from B = 0",
        optimizer=SGD,
        aggregator="product-delta",
        from_zero=True,
    ),
    Setting(
        name="SGD, no clipping, `product-delta`, from B ≠ 0",
        optimizer=SGD,
        aggregator="product-delta",
    ),
    Setting(name="SGD, clipping per part, `fedit`", optimizer=CLIPPED),
    Setting(name="SGD, clipping over the model, `fedit`", optimizer=CLIPPED, over="model"),
    Setting(name="AdamW at the defaults", optimizer=ADAMW, aggregator="product-delta"),
    Setting(
        name="AdamW, clipping over the model, `train.sync = gradients`",
        optimizer=ADAMW,
        over="model",
        sync="gradients",
    ),
)


def main() -> None:
    """Print the table."""
    logging.disable(logging.WARNING)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        print(table(write_model(Path(folder) / "model")))


def table(model: Path) -> str:
    """Return the table as Markdown, for a model of :func:`write_model`."""
    models = Models(run_config(SETTINGS[0], model, steps=1))
    columns = [f"{part}, {steps} step{'s' * (steps > 1)}" for steps in STEPS for part in PARTS]
    lines = [f"| setting | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for setting in SETTINGS:
        distances = [distance for n in STEPS for distance in measure(setting, models, n).values()]
        lines.append(f"| {setting.name} | {' | '.join(map(in_words, distances))} |")
    return "\n".join(lines)


def in_words(distance: float) -> str:
    """Return a distance as it stands in the table."""
    if distance < NEGLIGIBLE:
        return "< 1e-5"
    return f"{100 * distance:.2g} %" if distance < 0.0995 else f"{100 * distance:.0f} %"


class Models:
    """The unsplit model and the clients' parts of it, made once; every run loads its adapter.

    Args:
        config: Of any row: they differ in nothing that makes a model.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        source, cuts = ModelSource.of(config.model), model_cuts(config)
        self.whole = load_whole_model(source)
        attach_lora(self.whole, cuts, all_parts(config), seed=config.seed)
        self.initial = adapter_state(self.whole)
        self.scales = lora_scales(self.whole)
        client = load_client_model(source, cuts, torch.nn.Identity())
        attach_lora(client, cuts, client_parts(config), seed=config.seed)
        self.clients = [copy.deepcopy(client) for _ in LENGTHS]


def measure(setting: Setting, models: Models, steps: int) -> dict[str, float]:
    """Return ‖federated − central‖ / ‖central − start‖ of a round, by part."""
    config = run_config(setting, Path(models.config.model.name), steps)
    batches = {slot: client_batches(slot, steps) for slot in range(len(LENGTHS))}
    start = models.initial if setting.from_zero else moved(models.initial)
    load_adapter_state(models.whole, start)
    central = train_whole(models.whole, config, batches, steps)
    clients = [FederatedClient(config, start, s, m) for s, m in enumerate(models.clients)]
    found = train_federated(config, start, clients, batches)
    distances = {}
    for part, names in modules_of(config, models.scales).items():
        one, other, before = (
            products(state, names, models.scales) for state in (found, central, start)
        )
        distances[part] = float((one - other).norm() / (other - before).norm())
    return distances


def write_model(path: Path) -> Path:
    """Write a Llama of six layers with weights of a size that gives every part a real gradient."""
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


def run_config(setting: Setting, model: Path, steps: int) -> RunConfig:
    """Return a run of one round."""
    return RunConfig(
        num_server_rounds=1,
        model=ModelConfig(name=str(model), first_cut=2, second_cut=4),
        lora=LoraConfigs(
            bottom=LoraPartConfig(r=4, alpha=8.0),
            trunk=LoraPartConfig(r=3, alpha=6.0),
            top=LoraPartConfig(r=2, alpha=2.0),
        ),
        train=TrainConfig(
            local_steps=steps,
            optimizer=setting.optimizer,
            max_grad_norm_over=setting.over,
            sync=setting.sync,
        ),
        trunk=TrunkConfig(optimizer=setting.optimizer),
        strategy=StrategyConfig(aggregator=setting.aggregator),
    )


def client_batches(slot: int, steps: int) -> list[Batch]:
    """Return one micro-batch for each step: right-padded random sequences."""
    generator = torch.Generator().manual_seed(slot)
    lengths = LENGTHS[slot]
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    made = []
    for _ in range(steps):
        ids = torch.randint(1, VOCAB_SIZE, mask.shape, generator=generator) * mask
        labels = torch.where(mask.bool(), ids, -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def moved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter with B away from zero, so that A has a gradient too."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sorted(state.items())
    }


def train_whole(
    model: PreTrainedModel, config: RunConfig, batches: Mapping[int, Sequence[Batch]], steps: int
) -> dict[str, Tensor]:
    """Return the adapter after ``steps`` on everybody's batches together."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = config.train.optimizer
    optimizer, rate = make_optimizer(trained, settings), LearningRate(settings, steps)
    for step in range(steps):
        together = [batches[slot][step] for slot in sorted(batches)]
        tokens = sum(count_label_tokens(batch) for batch in together)
        for batch in together:
            torch.autograd.backward(causal_lm_loss(model, batch, tokens, torch.device("cpu")))
        if settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        rate.apply(optimizer, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return adapter_state(model)


def train_federated(
    config: RunConfig,
    start: Mapping[str, Tensor],
    clients: "Sequence[FederatedClient]",
    batches: Mapping[int, Sequence[Batch]],
) -> dict[str, Tensor]:
    """Return the adapter of all parts after one round of all clients at once."""
    engine = make_engine(config)
    load_adapter_state(engine.compute.trunk, {n: start[n] for n in engine.adapter()})
    engine.keep_as_initial()
    server = TrunkServer(engine, coordinator_token=TOKEN)
    address = f"127.0.0.1:{server.start()}"
    coordinator = TrunkCoordinator(address, TOKEN, timeout=60.0)
    try:
        tokens = {slot: f"token {slot}" for slot in batches}
        coordinator.begin_round(
            RoundPlan(
                experiment="equality",
                server_round=1,
                attempt=0,
                participants=tokens,
                steps_per_round=len(batches[0]),
                finish=finish_rule(config),
            )
        )
        with ThreadPoolExecutor(len(batches)) as pool:
            done = [
                pool.submit(clients[slot].train, address, tokens[slot], batches[slot])
                for slot in batches
            ]
            updates = [future.result(timeout=120) for future in done]
        coordinator.prepare_round("equality", 1, 0)
        coordinator.commit_round("equality", 1, 0)
        aggregator = AdapterAggregator(config.strategy.aggregator, lora_scales(clients[0].model))
        aggregator.init(clients[0].start)
        aggregator.aggregate(updates)
        return {**aggregator.distribute(), **engine.adapter()}
    finally:
        coordinator.close()
        server.stop(0.0)
        engine.close()


class FederatedClient:
    """One client's part of the model."""

    def __init__(
        self, config: RunConfig, start: Mapping[str, Tensor], slot: int, model: PreTrainedModel
    ) -> None:
        self.config, self.slot, self.model = config, slot, model
        self.start = {name: start[name] for name in adapter_state(model)}

    def train(self, address: str, token: str, batches: Sequence[Batch]) -> AdapterUpdate:
        """Train one round; return the adapter, weighted by label tokens."""
        load_adapter_state(self.model, self.start)
        position = RoundPosition(
            server_round=1,
            num_server_rounds=1,
            num_steps=len(batches),
            partition_id=self.slot,
        )
        with RemoteTrunk(
            address,
            token=token,
            fingerprint=fingerprint(self.config),
            mode=self.config.mode,
            call_timeout=60.0,
        ) as trunk:
            set_trunk(self.model, trunk)
            trunk.open(len(batches))
            result = train_round(self.model, iter(batches), self.config, position, trunk)
        weight = float(result.num_tokens)
        return AdapterUpdate(self.slot, self.start, adapter_state(self.model), weight)


def modules_of(config: RunConfig, names: Mapping[str, float]) -> dict[str, list[str]]:
    """Return the modules with LoRA of the clients and of the trunk."""
    cuts = model_cuts(config)
    layers = [f".layers.{index}." for index in range(cuts.first, cuts.second)]
    trunk = [name for name in names if any(layer in name for layer in layers)]
    return {"clients": [name for name in names if name not in trunk], "trunk": trunk}


def products(
    state: Mapping[str, Tensor], modules: Sequence[str], scales: Mapping[str, float]
) -> Tensor:
    """Return ΔW = scale · B A of all ``modules`` as one vector, in fp64."""
    return torch.cat(
        [
            (
                scales[name]
                * state[f"{name}.lora_B.weight"].double()
                @ state[f"{name}.lora_A.weight"].double()
            ).flatten()
            for name in modules
        ]
    )


if __name__ == "__main__":
    main()
