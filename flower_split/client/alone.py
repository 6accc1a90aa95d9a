"""The local-only baseline's client half: the whole model in this process, and no trunk.

The figures answer what one client could learn from its own data alone.
"""

from collections.abc import Mapping

from torch import Tensor

from flower_split.client.client import SAME_AS_RUN, Client
from flower_split.lora import adapter_state, load_adapter_state, lora_scales
from flower_split.parties.client_ranks import widened
from flower_split.training.loss import evaluate
from flower_split.training.measures import EvalResult
from flower_split.training.round import train_round


def train_alone(client: Client) -> dict[str, Tensor]:
    """Train all three parts, for as many steps as the run, from the same start.

    Returns:
        The adapter of the whole model; trained at this client's ranks, written at the run's.
    """
    model, initial = client.kept.whole_model(client.own)
    load_adapter_state(model, initial)
    for server_round in range(1, client.config.num_server_rounds + 1):
        position, batches = client.position(server_round), client.batches(server_round)
        train_round(model, batches, client.config, position, None)
    state = adapter_state(model)
    if client.own == SAME_AS_RUN:
        return state
    runs_model, runs_initial = client.kept.whole_model(SAME_AS_RUN)
    return widened(state, lora_scales(model), runs_initial, lora_scales(runs_model))


def evaluate_alone(client: Client, adapter: Mapping[str, Tensor]) -> EvalResult:
    """Return the held-out loss of an adapter of the whole model, at the run's ranks."""
    model, _ = client.kept.whole_model(SAME_AS_RUN)
    load_adapter_state(model, adapter)
    return evaluate(model, client.eval_batches(), client.device)
