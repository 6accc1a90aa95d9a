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

from flower_split.client.alone import evaluate_alone, part_optimizers, train_alone
from flower_split.client.client import SAME_AS_RUN, Client
from flower_split.client.model_cache import ClientCache
from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.experiments.baseline_records import (
    evaluate_all,
    evaluate_if_due,
    metrics_of,
    record_training,
    write_adapters,
)
from flower_split.experiments.turn_baselines import (
    federated_round,
    run_rounds,
    sequential_round,
    split_fed_v1_round,
    split_fed_v2_round,
)
from flower_split.lora import adapter_state, load_adapter_state
from flower_split.runs.directory import RunDirectory
from flower_split.runs.outcome import RoundOutcome
from flower_split.server.recorder import Recorder
from flower_split.training.loss import Batch
from flower_split.training.measures import TrainResult
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
    if name != "alone" and config.fraction_train < 1:
        raise ConfigError(
            f"the {name} baseline takes the batches of all clients in every round, and "
            f"fraction-train is {config.fraction_train:g}. Set it to 1.0, or leave {name} out."
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
    evaluate_all(clients, recorder, 0, initial)
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
        record_training(recorder, server_round, _ALL, result, with_steps=False)
        evaluate_if_due(clients, recorder, server_round, adapter_state(model))
        recorder.round_done(RoundOutcome(server_round, time.monotonic() - start))
    write_adapters(recorder, client, model)


def _alone(clients: Sequence[Client], recorder: Recorder) -> None:
    config, last = recorder.config, recorder.config.num_server_rounds
    _, initial = clients[0].kept.whole_model(SAME_AS_RUN)
    evaluate_all(clients, recorder, 0, initial)
    start = time.monotonic()
    for client in clients:
        slot = client.partition_id

        def on_round(server_round: int, result: TrainResult, slot: int = slot) -> None:
            record_training(recorder, server_round, slot, result, with_steps=True)

        adapter = train_alone(client, on_round)
        recorder.evaluation(last, slot, metrics_of(evaluate_alone(client, adapter)))
    seconds = (time.monotonic() - start) / config.num_server_rounds
    for server_round in range(1, last + 1):
        recorder.round_done(RoundOutcome(server_round, seconds))


def in_turn(streams: Sequence[Iterator[Batch]], count: int) -> Iterator[Batch]:
    """Yield ``count`` micro-batches of each stream in turn, endlessly."""
    while True:
        for stream in streams:
            for _ in range(count):
                yield next(stream)


class Baseline:
    """One baseline.

    Attributes:
        about: What it is, in a sentence.
        run: Trains, evaluates and records it.
        whole_model: Whether a client has all of the model, and there is no trunk.
        in_turns: Whether the trunk works with one client at a time.
        trunk_copies: Whether each client has a copy of the trunk.
        all_in_a_step: Whether an optimizer step takes the micro-batches of all clients.
    """

    def __init__(
        self,
        about: str,
        run: Callable[[Sequence[Client], Recorder], None],
        *,
        whole_model: bool = False,
        in_turns: bool = False,
        trunk_copies: bool = False,
        all_in_a_step: bool = False,
    ) -> None:
        self.about = about
        self.run = run
        self.whole_model = whole_model
        self.in_turns = in_turns
        self.trunk_copies = trunk_copies
        self.all_in_a_step = all_in_a_step


BASELINES: Mapping[str, Baseline] = {
    "central": Baseline(
        "the unsplit model, trained on the union of the clients' data with as many optimizer steps "
        "as each client takes, every step on the micro-batches of all clients.",
        _central,
        whole_model=True,
        all_in_a_step=True,
    ),
    "alone": Baseline(
        "each client trains the unsplit model on its own data alone, and is evaluated on its own "
        "held-out data.",
        _alone,
        whole_model=True,
    ),
    "federated": Baseline(
        "federated LoRA with the whole model on each client: in every round each trains it from the "
        "global adapter, and A and B of all parts are averaged by tokens.",
        lambda clients, recorder: run_rounds(clients, recorder, federated_round),
        whole_model=True,
    ),
    "splitfed-v1": Baseline(
        "SplitFed V1: the server has a copy of the trunk for each client, and after every round the copies "
        "are averaged by tokens, as are bottoms and tops (Thapa et al., AAAI 2022). It computes what "
        "federated computes; what differs is who holds what, and what travels.",
        lambda clients, recorder: run_rounds(clients, recorder, split_fed_v1_round),
        trunk_copies=True,
    ),
    "sequential": Baseline(
        "split learning in turns: the clients train one after the other, each from where the one before "
        "it stopped, with one trunk (Gupta and Raskar, 2018).",
        lambda clients, recorder: run_rounds(clients, recorder, sequential_round),
        in_turns=True,
    ),
    "splitfed-v2": Baseline(
        "SplitFed V2: in every round one trunk trains with one client after the other, in random order; "
        "bottoms and tops begin equal and are averaged by tokens (Thapa et al., AAAI 2022).",
        lambda clients, recorder: run_rounds(clients, recorder, split_fed_v2_round),
        in_turns=True,
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
    "train.sync",
)
_OF_ITS_TRUNK = ("trunk.optimizer.", "trunk.train")  # which an unsplit model trains as well


def has_own_baseline(key: str) -> bool:
    """Return whether runs that differ in a run-config key have baselines of their own.

    What belongs to the federation, such as ``strategy.*`` or ``mode``, has not: all of its values
    are compared with the baseline of the first.
    """
    return key.startswith(_OF_ITS_TRUNK) or not key.startswith(_OF_THE_FEDERATION)
