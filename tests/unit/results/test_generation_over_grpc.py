"""Generation over a served trunk: the unsplit model's tokens, one position a token on the wire."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import OptimizerConfig
from flower_split.errors import RefusalReason, SplitError, TrunkRefused
from flower_split.protocol.values import RoundPlan
from flower_split.split import set_trunk, split_model
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.service.server import TrunkServer
from tests.support.generation_rig import (
    CUTS,
    FAMILIES,
    MODES,
    NEW_TOKENS,
    generated,
    going_on,
    lively_model,
    prompts,
)

FINGERPRINT = {"model": "lively"}


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Served:
    """A client model whose trunk is behind gRPC, in an evaluation session."""

    def __init__(self, model: PreTrainedModel, engine: TrunkEngine, port: int) -> None:
        self.client = model
        self.engine = engine
        self.port = port

    def connect(self, slot: int = 0) -> RemoteTrunk:
        trunk = RemoteTrunk(
            f"127.0.0.1:{self.port}",
            token=f"token-{slot}",
            fingerprint=FINGERPRINT,
            mode="joint",
            call_timeout=20.0,
        )
        trunk.open(0, evaluate=True)
        set_trunk(self.client, trunk)
        return trunk


@contextmanager
def served(model: PreTrainedModel, **options: object) -> Iterator[Served]:
    client, trunk = split_model(model, CUTS)
    optimizer = OptimizerConfig(name="sgd", learning_rate=0.1)
    engine = TrunkEngine(
        TrunkCompute(trunk, optimizer, seed=0),
        mode="joint",
        hidden_size=trunk.hidden_size,
        fingerprint=FINGERPRINT,
        activation_bytes=1 << 20,
        **options,
    )
    server = TrunkServer(engine, coordinator_token="a coordinator token")
    try:
        port = server.start()
        engine.begin_round(evaluation())
        yield Served(client, engine, port)
    finally:
        server.stop(0.0)
        engine.close()


def evaluation(server_round: int = 1) -> RoundPlan:
    return RoundPlan(
        experiment="e",
        server_round=server_round,
        attempt=0,
        participants={0: "token-0", 1: "token-1"},
        join_seconds=1e6,
        window_seconds=50.0,
        evaluate=True,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_over_grpc_equals_unsplit(family: str) -> None:
    model = lively_model(family)
    with served(model) as fed, fed.connect():
        for mode in MODES:
            assert torch.equal(generated(fed.client, mode), generated(model, mode)), mode


def test_generate_over_grpc_without_cache_equals_unsplit() -> None:
    model = lively_model("llama")
    with served(model) as fed, fed.connect():
        for mode in MODES:
            found = generated(fed.client, mode, use_cache=False)
            assert torch.equal(found, generated(model, mode, use_cache=False)), mode
        assert fed.engine.cache_bytes() == 0


def test_generate_over_grpc_sends_one_position_per_token() -> None:
    model = lively_model("llama")
    calls: list[tuple[int, int]] = []
    with served(model) as fed, fed.connect() as trunk:
        forward = trunk.forward

        def counted(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
            before = trunk.stats.bytes_sent
            output = forward(hidden, *args, **kwargs)
            calls.append((hidden.shape[1], trunk.stats.bytes_sent - before))
            return output

        trunk.forward = counted
        generated(fed.client, "greedy")
        with_cache = trunk.take_stats()
        generated(fed.client, "greedy", use_cache=False)
        without = trunk.take_stats()
    positions = [count for count, _ in calls[:NEW_TOKENS]]
    assert positions == [7] + [1] * (NEW_TOKENS - 1)
    sizes = [size for _, size in calls[1:NEW_TOKENS]]
    one_position = 2 * (32 * 4 + 8 + 1)  # two rows of hidden states, position ids, mask
    assert max(sizes) < one_position + 400  # the header: tokens, names, numbers
    assert max(sizes) - min(sizes) <= 4  # numbers in the header grow, the payload does not
    assert without.bytes_sent > 5 * with_cache.bytes_sent


def test_cache_on_the_trunk_is_freed_when_the_client_is_done() -> None:
    model = lively_model("llama")
    with served(model) as fed, fed.connect() as trunk:
        generated(fed.client, "greedy")
        held = fed.engine.cache_bytes()
        one = 2 * 2 * 2 * 8 * 4  # keys and values, two trunk layers, two heads of 8, fp32
        assert held >= 2 * (7 + NEW_TOKENS - 1) * one
        gc.collect()
        generated(fed.client, "greedy")  # says with its first call that the former is done with
        assert fed.engine.cache_bytes() == held
        trunk.close()
        assert fed.engine.cache_bytes() == 0


def test_cache_of_an_abandoned_session_is_freed_when_its_lease_ends() -> None:
    model, clock = lively_model("llama"), Clock()
    with served(model, clock=clock) as fed, torch.no_grad():
        one, other = fed.connect(0), fed.connect(1)
        set_trunk(fed.client, one)
        kept = fed.client(**prompts(), use_cache=True).past_key_values
        clock.now += 30.0
        set_trunk(fed.client, other)
        at_work = fed.client(**prompts(), use_cache=True).past_key_values
        both = fed.engine.cache_bytes()
        clock.now += (
            30.0  # the first has been silent for 60 s, the second for 30 s; a lease is 50 s
        )
        assert 0 < fed.engine.cache_bytes() == both // 2
        step = {"input_ids": torch.ones(2, 1, dtype=torch.int64), "use_cache": True}
        fed.client(**step, **going_on(fed.client, at_work))
        set_trunk(fed.client, one)
        with pytest.raises(TrunkRefused) as refused:
            fed.client(**step, **going_on(fed.client, kept))
        assert refused.value.reason is RefusalReason.UNKNOWN_CACHE
        fed.engine.begin_round(evaluation(2))
        assert fed.engine.cache_bytes() == 0
        one.close()
        other.close()


def test_client_that_comes_back_to_its_session_generates_again() -> None:
    model = lively_model("llama")
    with served(model) as fed:
        fed.connect().close()
        with fed.connect():
            assert torch.equal(generated(fed.client, "greedy"), generated(model, "greedy"))
            assert fed.engine.cache_bytes() > 0


def test_cache_over_the_budget_is_refused_and_what_is_there_stays() -> None:
    model = lively_model("llama")
    per_token = 2 * 2 * 2 * 8 * 4
    with served(model, cache_bytes=2 * 20 * per_token) as fed, fed.connect(), torch.no_grad():
        cache = fed.client(**prompts(), use_cache=True).past_key_values
        held = fed.engine.cache_bytes()
        with pytest.raises(TrunkRefused, match=r"trunk\.cache-memory") as refused:
            fed.client(input_ids=torch.ones(4, 30, dtype=torch.int64), use_cache=True)
        assert refused.value.reason is RefusalReason.OVER_BUDGET
        assert fed.engine.cache_bytes() == held
        step = {"input_ids": torch.ones(2, 1, dtype=torch.int64), **going_on(fed.client, cache)}
        assert fed.client(**step, use_cache=True).logits.shape == (2, 1, 64)


def test_cache_begun_before_the_trunk_was_replaced_is_refused() -> None:
    model = lively_model("llama")
    with served(model) as fed, torch.no_grad():
        first = fed.connect(0)
        cache = fed.client(**prompts(), use_cache=True).past_key_values
        second = fed.connect(1)
        with pytest.raises(SplitError, match="another|before"):
            step = {"input_ids": torch.ones(2, 1, dtype=torch.int64)}
            fed.client(**step, **going_on(fed.client, cache))
        first.close()
        second.close()


def test_manual_loop_with_a_cache_of_ones_own_equals_unsplit() -> None:
    model = lively_model("mistral")
    with served(model) as fed, fed.connect(), torch.no_grad():
        logits = []
        for subject in (model, fed.client):
            cache, step = DynamicCache(config=model.config), dict(prompts())
            found = []
            for _ in range(12):
                output = subject(**step, **going_on(subject, cache), use_cache=True)
                found.append(output.logits[:, -1])
                mask = torch.nn.functional.pad(step["attention_mask"], (0, 1), value=1)
                step = {"input_ids": output.logits[:, -1:].argmax(-1), "attention_mask": mask}
            logits.append(torch.stack(found))
        assert torch.equal(*logits)
