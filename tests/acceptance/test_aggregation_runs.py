"""Aggregation options through the whole ServerApp: exclusion, server optimizers, resume, baseline."""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord

import flower_split.client.client
import tests.acceptance.test_mixed_ranks as mixed
from flower_split.config import Scalar, parse_run_config
from flower_split.errors import AggregationError, FederationError, FlowerSplitError
from flower_split.runs.directory import RunDirectory
from flower_split.runs.manifest import FOLDER, RunCheckpoints
from flower_split.server.app import run
from flower_split.training.measures import TrainResult
from flower_split.training.round import train_round
from tests.acceptance.test_mixed_ranks import (
    Job,
    Watched,
    best_of_rank,
    dense,
    job,
    mean_change,
    modules_of,
    parts,
)

__all__ = ["job", "parts"]  # pytest's fixtures
Tamper = Callable[[Message], None]


def weights_of(message: Message) -> dict[str, np.ndarray]:
    (record,) = message.content.array_records.values()
    return {name: array.numpy() for name, array in record.items()}


def with_weights(message: Message, weights: Mapping[str, np.ndarray]) -> None:
    message.content["arrays"] = ArrayRecord({name: Array(v) for name, v in weights.items()})


def nan(message: Message) -> None:
    weights = weights_of(message)
    last = sorted(weights)[-1]
    with_weights(message, weights | {last: weights[last] * np.float32("nan")})


def another_rank(message: Message) -> None:
    cut = {n: v[:1] if "lora_A" in n else v[:, :1] for n, v in weights_of(message).items()}
    with_weights(message, cut)


def lacking(message: Message) -> None:
    weights = weights_of(message)
    with_weights(message, {name: weights[name] for name in sorted(weights)[1:]})


def integers(message: Message) -> None:
    with_weights(message, {n: v.astype(np.int32) for n, v in weights_of(message).items()})


def two_adapters(message: Message) -> None:
    message.content["more"] = message.content["arrays"]


def tokens(value: float) -> Tamper:
    def set_tokens(message: Message) -> None:
        (metrics,) = message.content.metric_records.values()
        message.content["metrics"] = MetricRecord({**dict(metrics.items()), "num-tokens": value})

    return set_tokens


TAMPERS: dict[str, tuple[Tamper, str]] = {
    "nan": (nan, "NaN or Inf"),
    "rank": (another_rank, "received rank 4 and returned rank 1"),
    "lacking": (lacking, "returned an adapter that lacks"),
    "integers": (integers, "floating"),
    "two": (two_adapters, "2 ArrayRecords"),
    "negative": (tokens(-5), "weight -5"),
    "absurd": (tokens(1e12), "reports num-tokens = 1e\\+12"),
}


def tampered(monkeypatch: pytest.MonkeyPatch, tamper: Tamper, server_round: int = 1) -> None:
    """Client 1's training reply of a round is changed on its way."""
    pull = Watched.pull_messages

    def pull_messages(self: Watched, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = dict(self._waiting)
        replies = list(pull(self, message_ids))
        for reply in replies:
            metadata = waiting[reply.metadata.reply_to_message_id].metadata
            mine = (metadata.dst_node_id, metadata.message_type) == (101, "train")
            if mine and metadata.group_id == str(server_round):
                tamper(reply)
        return replies

    monkeypatch.setattr(Watched, "pull_messages", pull_messages)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What this package logs, whether or not an app has put its own handler there before."""
    logger = logging.getLogger("flower_split")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    with caplog.at_level(logging.WARNING, logger="flower_split"):
        yield


def some_slow(names: Iterable[str], quick: Collection[str]) -> list[object]:
    """All names as parameters; those that are not quick run with ``-m slow`` only."""
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(names)
    ]


@pytest.mark.parametrize("kind", some_slow(TAMPERS, ("nan", "rank", "absurd")))
def test_malformed_update_is_excluded_by_name_and_the_others_alone_count(
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    log: None,
    kind: str,
) -> None:
    tamper, words = TAMPERS[kind]
    tampered(monkeypatch, tamper)
    done, rounds = job.run("product-delta", strategy__on_invalid="exclude", num_server_rounds=1)
    final = done.read_adapter("client")
    honest = [turn for turn in rounds[0] if turn.slot != 1]
    for module in modules_of(final):
        goal = mean_change(honest, module, torch.zeros(()))
        assert float((dense(final, module) - best_of_rank(goal, mixed.FULL)).norm()) < 1e-5 * float(
            goal.norm()
        )
    (record,) = done.metrics("aggregation")
    assert record["clients"] == ["0", "2"]
    assert list(record["excluded"]) == ["1"]
    assert re.search(words, record["excluded"]["1"])
    assert "partition 1 (node 101): its adapter was left out" in caplog.text
    assert (
        "Partition 1: its adapter was left out in round 1" in (done.path / "report.md").read_text()
    )


@pytest.mark.parametrize("kind", some_slow(["nan", "rank", "two", "absurd"], ("nan", "two")))
def test_malformed_update_is_refused_by_name_unless_it_may_be_excluded(
    job: Job, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tampered(monkeypatch, TAMPERS[kind][0])
    with pytest.raises(FlowerSplitError, match="(partition|client) 1") as caught:
        job.run("product-delta", num_server_rounds=1)
    assert isinstance(caught.value, (AggregationError, FederationError))
    assert not (job.root / "run" / "adapters" / "client.safetensors").exists()


def test_update_that_cannot_be_read_ends_the_run_in_words_that_name_its_client(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(message: Message) -> None:
        message.content["arrays"] = ArrayRecord({"a": Array("float32", (1,), "noise", b"x")})

    tampered(monkeypatch, unreadable)
    with pytest.raises(FederationError, match="partition 1 .*cannot be read"):
        job.run("product-delta", num_server_rounds=1)


def stop_in_round_two(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Training fails in round 2 until the function that is returned is called."""
    failing = [True]

    def stop(model, batches, config, place, trunk, **rest) -> TrainResult:  # type: ignore[no-untyped-def]
        if place.server_round == 2 and failing[0]:
            raise FederationError("the disk is full. Make room.")
        return train_round(model, batches, config, place, trunk, **rest)

    monkeypatch.setattr(flower_split.client.client, "train_round", stop)
    return lambda: failing.__setitem__(0, False)


OPTIONS: dict[str, dict[str, Scalar]] = {
    "adam": {
        "strategy__server_optimizer": "adam",
        "strategy__server_learning_rate": 0.01,
        "strategy__max_rank": 10,
        "strategy__rules": "clamp-weights=1.5, norm-clipping=2",
    },
    "yogi": {
        "strategy__server_optimizer": "yogi",
        "strategy__server_learning_rate": 0.02,
        "strategy__server_beta1": 0.5,
        "strategy__aggregator": "florist",
        "strategy__options": "tau=0.9",
    },
}


@pytest.mark.parametrize("options", some_slow(OPTIONS, ("adam",)))
def test_run_with_server_moments_is_resumed_to_the_same_bits(
    job: Job, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    changes = {"num_server_rounds": 3, **OPTIONS[options]}
    whole, _ = replace(job, root=job.root / "whole").run("product-delta", **changes)
    go_on = stop_in_round_two(monkeypatch)
    with pytest.raises(FederationError, match="disk is full"):
        job.run("product-delta", **changes)
    go_on()
    path = job.root / "run"
    config = {**job.config("product-delta", **changes), "resume": str(path)}
    run(Watched(3, config, job.nodes), parse_run_config(config))
    one, two = (
        RunCheckpoints(at / FOLDER).latest() for at in (whole.path, RunDirectory.open(path).path)
    )
    assert one is not None and two is not None and two.entry.server_round == 3
    moments = [name for name in one.strategy if "extra." in name]
    assert moments and any(bool(one.strategy[name].count_nonzero()) for name in moments)
    for first, second in ((one.adapter, two.adapter), (one.strategy, two.strategy)):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_local_only_baseline_works_with_mixed_ranks(job: Job) -> None:
    rate = {f"{side}__optimizer__learning_rate": 0.05 for side in ("train", "trunk")}
    done, _ = job.run("product-delta", num_server_rounds=1, local_only_baseline=True, **rate)
    pairs = {
        (record["trained_by"], record["partition_id"]): record["perplexity"]
        for record in done.metrics("evaluation")
        if record.get("local_only")
    }
    assert sorted(pairs) == [(i, j) for i in range(3) for j in range(3)]
    assert len(set(pairs.values())) == 9
    base = {r["partition_id"]: r["perplexity"] for r in done.metrics("evaluation")
            if r.get("server_round") == 0}  # fmt: skip
    assert all(pairs[own, own] < base[own] for own in range(3))


def test_combination_that_cannot_work_ends_the_run_before_it_has_a_directory(job: Job) -> None:
    with pytest.raises(AggregationError, match="hetlora takes no server optimizer"):
        job.run("hetlora", strategy__server_optimizer="adam")
    assert not (job.root / "run").exists()


def test_rule_that_needs_more_clients_ends_the_run_before_round_one(job: Job) -> None:
    with pytest.raises(
        AggregationError, match="krum against 1 .* at least 5 clients.* 3 take part"
    ):
        job.run("product-delta", strategy__rules="krum=1")


def test_median_under_mixed_ranks_names_partitions_and_nodes(job: Job) -> None:
    with pytest.raises(AggregationError, match=r"median.*0 \(node 100\), 1 \(node 101\) have"):
        job.run("product-delta", strategy__rules="median")
