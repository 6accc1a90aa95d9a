"""The local-only baseline's client half: the whole model in this process, and no trunk.

The figures answer what one client could learn from its own data alone, with the run's configuration:
the parts that the run trains, each with its own optimizer (``train.optimizer`` for bottom and top,
``trunk.optimizer`` for the trunk), the same batches and the same number of steps. Nothing is averaged,
so both optimizers go on from the first step to the last.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from flower_split.client.client import SAME_AS_RUN, Client
from flower_split.lora import (
    adapter_state,
    embedding_names,
    load_adapter_state,
    lora_scales,
    part_of,
    stack_of,
)
from flower_split.lora.state import adapter_parameters
from flower_split.parties.client_ranks import widened
from flower_split.parties.parts import model_cuts
from flower_split.training.measures import EvalResult, TrainResult
from flower_split.training.optimizers import PartOptimizer
from flower_split.training.round import train_round


def train_alone(
    client: Client, on_round: Callable[[int, TrainResult], None] = lambda number, result: None
) -> dict[str, Tensor]:
    """Train all three parts, for as many steps as the run, from the same start.

    Args:
        client: The client whose data it trains on.
        on_round: Called after each of the run's rounds, from 1, with what was measured.

    Returns:
        The adapter of the whole model; trained at this client's ranks, written at the run's.
    """
    model, initial = client.kept.whole_model(client.own)
    load_adapter_state(model, initial)
    optimizers = part_optimizers(client, model)
    for server_round in range(1, client.config.num_server_rounds + 1):
        position, batches = client.position(server_round), client.batches(server_round)
        on_round(
            server_round,
            train_round(model, batches, client.config, position, None, optimizers=optimizers),
        )
    state = adapter_state(model)
    if client.own == SAME_AS_RUN:
        return state
    runs_model, runs_initial = client.kept.whole_model(SAME_AS_RUN)
    return widened(state, lora_scales(model), runs_initial, lora_scales(runs_model))


def evaluate_alone(client: Client, adapter: Mapping[str, Tensor]) -> EvalResult:
    """Return the held-out loss and scores of an adapter of the whole model, at the run's ranks."""
    model, _ = client.kept.whole_model(SAME_AS_RUN)
    load_adapter_state(model, adapter)
    return client.held_out(model)


def part_optimizers(client: Client, model: PreTrainedModel) -> list[PartOptimizer]:
    """Return one optimizer for bottom and top, and one for the trunk where it trains.

    Args:
        client: Its configuration names the optimizers, and its steps place their schedules.
        model: The unsplit model, with LoRA.
    """
    config = client.config
    named = {name: p for name, p in adapter_parameters(model) if p.requires_grad}
    of_trunk = names_of_trunk(client, model, named)
    total = client.position(1).total_steps
    pairs = (
        ([p for name, p in named.items() if name not in of_trunk], config.train.optimizer),
        ([p for name, p in named.items() if name in of_trunk], config.trunk.optimizer),
    )
    return [PartOptimizer(owned, settings, total) for owned, settings in pairs if owned]


def names_of_trunk(client: Client, model: PreTrainedModel, names: Iterable[str]) -> frozenset[str]:
    """Return those of ``names``, parameters of an unsplit model, that the run's trunk would hold."""
    stack, cuts = stack_of(model), model_cuts(client.config)
    embeddings = frozenset(name.removesuffix(".base_layer") for name in embedding_names(model))
    found = set()
    for name in names:
        module = name.split(".lora_", 1)[0] if ".lora_" in name else name.rpartition(".")[0]
        if part_of(module, stack, cuts, embeddings) == "trunk":
            found.add(name)
    return frozenset(found)
