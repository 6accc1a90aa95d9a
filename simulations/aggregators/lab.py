"""The quick-start's model and data in one process: clients that train, a server that aggregates."""

import argparse
import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flower_split.aggregation import make_aggregator
from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterUpdate
from flower_split.aggregation.from_config import parse_options
from flower_split.assets import resolve_model_path
from flower_split.config import LoraPartConfig, ModelConfig, RunConfig, TrainConfig
from flower_split.data import ClientData, batches, eval_batches, load_client_data, load_tokenizer
from flower_split.lora import (
    adapter_state,
    attach_lora,
    load_adapter_state,
    lora_scales,
    set_trainable,
)
from flower_split.lora.core_training import core_columns_state, trained_cores
from flower_split.split import CutLayers
from flower_split.training.loss import evaluate

ALPHA = 16.0
CUTS = CutLayers(2, 6)
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One federation.

    Args:
        name: For the table.
        ranks: One per client.
        fraction: Share of the clients that train in a round.
    """

    name: str
    ranks: tuple[int, ...]
    fraction: float = 1.0


@dataclass(slots=True)
class Outcome:
    """What one method did in one federation.

    Args:
        losses: Held-out loss per label token over all clients, before round 1 and after each.
        bytes_up: From all clients, over the run.
        bytes_down: To all clients, over the run; what a client has already is not sent again.
        seconds: The server's, over the run.
    """

    losses: list[float] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


class Client:
    """One client's stream of batches, the factors it keeps, and what it was sent last.

    Args:
        rank: Of its LoRA.
        stream: Endless batches of its data.
    """

    def __init__(self, rank: int, stream: Iterator[dict[str, Tensor]]) -> None:
        self.rank = rank
        self.stream = stream
        self.private: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.base_bytes = 0
        self.has_core = False  # whether it was sent the frozen factors of a core


class Lab:
    """The model at every rank that occurs, and all clients' data; shared by all runs.

    Args:
        arguments: The command line.
        ranks: Every rank that occurs.
    """

    def __init__(self, arguments: argparse.Namespace, ranks: set[int]) -> None:
        self.arguments = arguments
        config = RunConfig(
            seed=arguments.seed,
            model=ModelConfig(),
            train=TrainConfig(sequence_length=arguments.sequence_length),
        )
        tokenizer = load_tokenizer(config.model)
        self.pad = int(tokenizer.pad_token_id)
        self.data: list[ClientData] = [
            load_client_data(config, tokenizer, index, arguments.clients)
            for index in range(arguments.clients)
        ]
        base = AutoModelForCausalLM.from_pretrained(resolve_model_path(config.model.name))
        self.weights = {name: value.detach().clone() for name, value in base.named_parameters()}
        self.models: dict[int, PreTrainedModel] = {}
        self.adapters: dict[int, dict[str, Tensor]] = {}
        for rank in sorted(ranks):
            model = copy.deepcopy(base)
            part = LoraPartConfig(r=rank, alpha=ALPHA)
            attach_lora(model, CUTS, {"bottom": part, "top": part}, seed=arguments.seed)
            self.models[rank] = model
            self.adapters[rank] = adapter_state(model)

    def clients(self, setting: Setting) -> list[Client]:
        """Return fresh clients; every run sees the same batches."""
        return [
            Client(
                rank,
                batches(
                    self.data[index].train,
                    self.arguments.batch_size,
                    seed=self.arguments.seed + index,
                    pad_token_id=self.pad,
                ),
            )
            for index, rank in enumerate(setting.ranks)
        ]

    def scales(self, rank: int) -> dict[str, float]:
        """Return module name → scale of a client of that rank: alpha / r."""
        return lora_scales(self.models[rank])

    def load(self, rank: int, adapter: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        """Set a model's adapter, and its base weights to the original ones plus ``base``."""
        model = self.models[rank]
        load_adapter_state(model, adapter)
        with torch.no_grad():
            for module in self.scales(rank):
                weight = model.get_submodule(module).base_layer.weight
                weight.copy_(self.weights[f"{module}.weight"])
                if module in base:
                    weight.add_(base[module])

    def train(
        self, client: Client, trainable: Sequence[str], columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Take some steps of AdamW on a client's data from what is loaded; return the adapter."""
        model = self.models[client.rank]
        model.train()
        set_trainable(model, trainable)
        with trained_cores(model, columns):
            chosen = [one for one in model.parameters() if one.requires_grad]
            optimizer = torch.optim.AdamW(chosen, lr=self.arguments.learning_rate, foreach=False)
            for _ in range(self.arguments.local_steps):
                optimizer.zero_grad()
                model(**next(client.stream)).loss.backward()
                torch.nn.utils.clip_grad_norm_(chosen, 1.0, foreach=False)
                optimizer.step()
        return adapter_state(model)

    def held_out_loss(self, rank: int, index: int) -> tuple[float, int]:
        """Loss sum and label tokens of one client's held-out data under what is loaded."""
        examples = self.data[index].evaluate[: self.arguments.eval_examples]
        found = evaluate(
            self.models[rank], eval_batches(examples, 16, self.pad), CPU, ModelConfig()
        )
        return found.loss_sum, found.num_tokens


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def base_weights(aggregator: AdapterAggregator) -> dict[str, Tensor]:
    """Return what has gone into every base weight, as a client adds it."""
    return {
        name: factors.scale * (factors.B @ factors.A)
        for name, factors in aggregator.base_changes().items()
    }


def bytes_sent(
    aggregator: AdapterAggregator, client: Client, sent: Mapping[str, Tensor], private: set[str]
) -> int:
    """Return bytes down to a client: tensors that differ from its last ones, and a changed base."""
    fresh = {
        name: value
        for name, value in sent.items()
        if name not in client.last
        or (name not in private and not torch.equal(client.last[name], value))
    }
    base = num_bytes(
        {
            name + side: getattr(factors, side)
            for name, factors in aggregator.base_changes().items()
            for side in ("A", "B")
        }
    )
    changed = base if base and base != client.base_bytes else 0
    client.base_bytes = base
    return num_bytes(fresh) + changed


def run(lab: Lab, method: str, setting: Setting) -> Outcome:
    """Run one method, by name or as ``name:options``, in one federation."""
    name, _, options = method.partition(":")
    arguments, top = lab.arguments, max(setting.ranks)
    clients = lab.clients(setting)
    settings = {"seed": arguments.seed, **parse_options(name, options)}
    aggregator = AdapterAggregator(make_aggregator(name, **settings), lab.scales(top))
    aggregator.init(lab.adapters[top])
    private = set(aggregator.private())
    sampler, outcome = random.Random(arguments.seed), Outcome()
    outcome.losses.append(overall_loss(lab, aggregator, clients, top))
    for _ in range(arguments.rounds):
        number = max(1, round(setting.fraction * len(clients)))
        trainable, base, updates = aggregator.trainable(), base_weights(aggregator), []
        columns = core_columns_state(aggregator.core_columns())
        for index in sorted(sampler.sample(range(len(clients)), number)):
            client, scales = clients[index], lab.scales(clients[index].rank)
            sent = aggregator.distribute(client.rank, scales)
            down = bytes_sent(aggregator, client, sent, private)
            client.last = sent
            lab.load(client.rank, {**sent, **client.private}, base)
            trained = lab.train(client, trainable, columns)
            client.private = {name: trained[name] for name in private}
            shown = {name: trained[name] for name in trainable if name not in private}
            up = num_bytes(shown)
            if columns:  # the core is all that need travel, once its frozen factors are there
                up = 4 * client.rank**2 * len(scales)
                down, client.has_core = (up if client.has_core else down + up), True
            outcome.bytes_up += up
            outcome.bytes_down += down
            weight = sum(len(example.input_ids) for example in lab.data[index].train)
            updates.append(AdapterUpdate(index, sent, shown, weight, scales))
        outcome.seconds += aggregator.aggregate(updates).seconds
        outcome.losses.append(overall_loss(lab, aggregator, clients, top))
    return outcome


def overall_loss(
    lab: Lab, aggregator: AdapterAggregator, clients: Sequence[Client], rank: int
) -> float:
    """Held-out loss per label token over all clients, each with the factors it keeps."""
    adapter, base = aggregator.distribute(rank, lab.scales(rank)), base_weights(aggregator)
    total, tokens = 0.0, 0
    lab.load(rank, adapter, base)
    for index, client in enumerate(clients):
        if client.private:
            lab.load(rank, {**adapter, **client.private}, base)
        loss, count = lab.held_out_loss(rank, index)
        total, tokens = total + loss, tokens + count
    return total / tokens
