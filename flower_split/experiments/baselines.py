"""Baselines of a run: the same configuration, data, seed and steps, without the federation.

``central`` trains the unsplit model on the union of the clients' data: an optimizer step takes the
micro-batches that all clients take in that step, in slot order, and one optimizer per part goes on
from the first step to the last. ``alone`` trains every client by itself. Both train by
:func:`flower_split.training.round.train_round` on the clients' own batches, in this process, and
leave a run directory like any other.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from flower_split.client.alone import evaluate_alone, names_of_trunk, part_optimizers, train_alone
from flower_split.client.client import SAME_AS_RUN, Client
from flower_split.client.model_cache import ClientCache
from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.lora import adapter_state, load_adapter_state
from flower_split.messages.replies import EVAL_LOSS, LOSS_SUM, NUM_EXAMPLES, NUM_TOKENS, TRAIN_LOSS
from flower_split.runs.directory import RunDirectory
from flower_split.runs.outcome import RoundOutcome
from flower_split.server.recorder import Recorder
from flower_split.server.rounds import is_evaluated
from flower_split.training.loss import Batch
from flower_split.training.measures import EvalResult, TrainResult
from flower_split.training.round import train_round

_ALL = 0  # whose line the central model's training is in


def run_baseline(name: str, config: RunConfig) -> None:
    """Run a baseline of ``config``, and write the run directory that it names.

    Args:
        name: A key of :data:`BASELINES`.
        config: The run's configuration.

    Raises:
        ConfigError: There is no such baseline, or this run cannot have it.
        DataError: A client has no usable data.
    """
    check_baseline(name, config)
    cache = ClientCache().of(config)
    clients = [Client(cache, slot, config.num_clients) for slot in range(config.num_clients)]
    recorder = Recorder(RunDirectory.create(config), config)
    recorder.notes.append(f'The baseline "{name}": {BASELINES[name].about}')
    recorder.clients({client.partition_id: client.facts(0) for client in clients})
    BASELINES[name].run(clients, recorder)
    counts = {"clients": len(clients), "server rounds": config.num_server_rounds}
    recorder.finish({"baseline": name, **counts})


def check_baseline(name: str, config: RunConfig) -> None:
    """Check that a run can have a baseline with the same data and the same number of steps.

    Raises:
        ConfigError: It cannot; names the key and the remedy.
    """
    if name not in BASELINES:
        raise ConfigError(
            f"--baselines takes {', '.join(BASELINES)}; {name!r} is none. Correct the name."
        )
    if config.strategy.name == "fedbuff":
        raise ConfigError(
            'a baseline takes as many steps as the run, and strategy.name = "fedbuff" has no rounds '
            "to count them by. Leave --baselines out."
        )
    if name == "central" and config.fraction_train < 1:
        raise ConfigError(
            "the central baseline takes the batches of all clients in every step, and "
            f"fraction-train is {config.fraction_train:g}. Set it to 1.0, or leave central out."
        )
    if name == "central" and config.train.local_epochs:
        raise ConfigError(
            "the central baseline takes as many optimizer steps as every client, and with "
            "train.local-epochs clients take different numbers. Set train.local-steps, or leave "
            "central out."
        )


def _central(clients: Sequence[Client], recorder: Recorder) -> None:
    config, client = recorder.config, clients[0]
    model, initial = client.kept.whole_model(SAME_AS_RUN)
    load_adapter_state(model, initial)
    _evaluate(clients, recorder, 0, initial)
    optimizers = part_optimizers(client, model)
    accumulate = config.train.gradient_accumulation_steps
    train = replace(config.train, gradient_accumulation_steps=accumulate * len(clients))
    for server_round in range(1, config.num_server_rounds + 1):
        start = time.monotonic()
        batches = in_turn([c.batches(server_round) for c in clients], accumulate)
        result = train_round(
            model,
            batches,
            replace(config, train=train),
            client.position(server_round),
            None,
            optimizers=optimizers,
        )
        _record(recorder, server_round, _ALL, result, with_steps=False)
        _evaluate_if_due(clients, recorder, server_round, adapter_state(model))
        recorder.round_done(RoundOutcome(server_round, time.monotonic() - start))
    _write_adapters(recorder, client, model)


def _alone(clients: Sequence[Client], recorder: Recorder) -> None:
    config, last = recorder.config, recorder.config.num_server_rounds
    _, initial = clients[0].kept.whole_model(SAME_AS_RUN)
    _evaluate(clients, recorder, 0, initial)
    start = time.monotonic()
    for client in clients:
        slot = client.partition_id

        def on_round(server_round: int, result: TrainResult, slot: int = slot) -> None:
            _record(recorder, server_round, slot, result, with_steps=True)

        adapter = train_alone(client, on_round)
        recorder.evaluation(last, slot, _metrics(evaluate_alone(client, adapter)))
    seconds = (time.monotonic() - start) / config.num_server_rounds
    for server_round in range(1, last + 1):
        recorder.round_done(RoundOutcome(server_round, seconds))


def in_turn(streams: Sequence[Iterator[Batch]], count: int) -> Iterator[Batch]:
    """Yield ``count`` micro-batches of each stream in turn, endlessly."""
    while True:
        for stream in streams:
            for _ in range(count):
                yield next(stream)


def _record(
    recorder: Recorder, server_round: int, slot: int, result: TrainResult, *, with_steps: bool
) -> None:
    lists = result.step_lists() if with_steps else {}
    metrics = {TRAIN_LOSS: result.loss, NUM_TOKENS: float(result.num_tokens)}
    recorder.steps(server_round, slot, lists, metrics)


def _evaluate_if_due(
    clients: Sequence[Client], recorder: Recorder, server_round: int, adapter: Mapping[str, Tensor]
) -> None:
    if recorder.config.fraction_evaluate and is_evaluated(recorder.config, server_round):
        _evaluate(clients, recorder, server_round, adapter)


def _evaluate(
    clients: Sequence[Client], recorder: Recorder, server_round: int, adapter: Mapping[str, Tensor]
) -> None:
    for client in clients:
        result = evaluate_alone(client, adapter)
        recorder.evaluation(server_round, client.partition_id, _metrics(result))
    if server_round == 0:
        recorder.round_done(RoundOutcome(0, 0.0))


def _metrics(result: EvalResult) -> dict[str, float]:
    return {
        LOSS_SUM: result.loss_sum,
        EVAL_LOSS: result.loss_sum / max(result.num_tokens, 1),
        NUM_TOKENS: result.num_tokens,
        NUM_EXAMPLES: result.num_examples,
        **result.sums,
    }


def _write_adapters(recorder: Recorder, client: Client, model: PreTrainedModel) -> None:
    """Write the model's adapter in the parts of a run, for export and generation."""
    state = adapter_state(model)
    of_trunk = names_of_trunk(client, model, state)
    for part in ("client", "trunk"):
        tensors = {n: t for n, t in state.items() if (n in of_trunk) == (part == "trunk")}
        recorder.run.write_adapter(part, tensors)


class Baseline:
    """One baseline.

    Attributes:
        about: What it is, in a sentence.
        run: Trains, evaluates and records it.
    """

    def __init__(self, about: str, run: Callable[[Sequence[Client], Recorder], None]) -> None:
        self.about = about
        self.run = run


BASELINES: Mapping[str, Baseline] = {
    "central": Baseline(
        "the unsplit model, trained on the union of the clients' data with as many optimizer steps "
        "as each client takes, every step on the micro-batches of all clients.",
        _central,
    ),
    "alone": Baseline(
        "each client trains the unsplit model on its own data alone, and is evaluated on its own "
        "held-out data.",
        _alone,
    ),
}
"""Name -> baseline."""

_OF_THE_FEDERATION = (
    "strategy.",
    "privacy.",
    "trunk.",
    "mode",
    "model.cuts-by-partition",
    "train.micro-batches-in-flight",
    "train.auxiliary-head",
)
_OF_ITS_TRUNK = ("trunk.optimizer.", "trunk.train")  # which an unsplit model trains as well


def has_own_baseline(key: str) -> bool:
    """Return whether runs that differ in a run-config key have baselines of their own.

    What belongs to the federation, such as ``strategy.*`` or ``mode``, has not: all of its values
    are compared with the baseline of the first.
    """
    return key.startswith(_OF_ITS_TRUNK) or not key.startswith(_OF_THE_FEDERATION)
