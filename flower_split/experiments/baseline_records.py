"""What every baseline does: evaluate all clients, record a round, write the adapters."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from flower_split.client.alone import evaluate_alone, names_of_trunk
from flower_split.client.client import Client
from flower_split.lora import adapter_state
from flower_split.messages.replies import EVAL_LOSS, LOSS_SUM, NUM_EXAMPLES, NUM_TOKENS, TRAIN_LOSS
from flower_split.runs.outcome import RoundOutcome
from flower_split.server.recorder import Recorder
from flower_split.server.rounds import is_evaluated
from flower_split.training.measures import EvalResult, TrainResult


def record_training(
    recorder: Recorder, server_round: int, slot: int, result: TrainResult, *, with_steps: bool
) -> None:
    """Record what was trained in a round, under a client's slot."""
    lists = result.step_lists() if with_steps else {}
    metrics = {TRAIN_LOSS: result.loss, NUM_TOKENS: float(result.num_tokens)}
    recorder.steps(server_round, slot, lists, metrics)


def evaluate_if_due(
    clients: Sequence[Client], recorder: Recorder, server_round: int, adapter: Mapping[str, Tensor]
) -> None:
    """Evaluate on every client's held-out data where the run evaluates after this round."""
    if recorder.config.fraction_evaluate and is_evaluated(recorder.config, server_round):
        evaluate_all(clients, recorder, server_round, adapter)


def evaluate_all(
    clients: Sequence[Client], recorder: Recorder, server_round: int, adapter: Mapping[str, Tensor]
) -> None:
    """Evaluate an adapter of the whole model on every client's held-out data."""
    for client in clients:
        result = evaluate_alone(client, adapter)
        recorder.evaluation(server_round, client.partition_id, metrics_of(result))
    if server_round == 0:
        recorder.round_done(RoundOutcome(0, 0.0))


def metrics_of(result: EvalResult) -> dict[str, float]:
    """Return an evaluation as the recorder takes it."""
    return {
        LOSS_SUM: result.loss_sum,
        EVAL_LOSS: result.loss_sum / max(result.num_tokens, 1),
        NUM_TOKENS: result.num_tokens,
        NUM_EXAMPLES: result.num_examples,
        **result.sums,
    }


def write_adapters(recorder: Recorder, client: Client, model: PreTrainedModel) -> None:
    """Write the model's adapter in the parts of a run, for export and generation."""
    state = adapter_state(model)
    of_trunk = names_of_trunk(client, model, state)
    for part in ("client", "trunk"):
        tensors = {n: t for n, t in state.items() if (n in of_trunk) == (part == "trunk")}
        recorder.run.write_adapter(part, tensors)
