"""DoRA: the mean of what clients compute with, against a dense reference in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterUpdate
from flower_split.aggregation.from_config import check_adapter, fits_dora
from flower_split.aggregation.rules.dora import DoraMean, norms_from
from flower_split.config import StrategyConfig
from flower_split.errors import AggregationError

OUT, IN, RANK, CLIENTS, SCALE = 24, 20, 3, 4, 2.0
State = dict[str, Tensor]


class Layer:
    """One layer's base weight and its clients, computed densely."""

    def __init__(self, *, embedding: bool = False, begins_with_delta: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        self.random: Callable[..., Tensor] = lambda *shape: torch.randn(*shape, generator=generator)
        self.embedding = embedding
        # A row of ``weight`` for each magnitude: an embedding's [num, dim] is turned.
        self.weight = self.random(OUT, IN).double()
        names = ("m.lora_embedding_A", "m.lora_embedding_B")
        self.a, self.b = names if embedding else ("m.lora_A.weight", "m.lora_B.weight")
        start = self.random(OUT, RANK) if begins_with_delta else torch.zeros(OUT, RANK)
        self.initial = self.state(self.random(RANK, IN), start, torch.ones(OUT))
        self.initial["m.lora_magnitude_vector"] = self.norm(self.initial).float()

    def state(self, a: Tensor, b: Tensor, magnitude: Tensor) -> State:
        """PEFT multiplies B [out, r] and A [r, in] also for an embedding, and turns the result."""
        return {self.a: a, self.b: b, "m.lora_magnitude_vector": magnitude}

    def direction(self, state: State) -> Tensor:
        return self.weight + SCALE * state[self.b].double() @ state[self.a].double()

    def norm(self, state: State) -> Tensor:
        return self.direction(state).norm(dim=1)

    def effective(self, state: State) -> Tensor:
        magnitude = state["m.lora_magnitude_vector"].double()
        return (magnitude / self.norm(state))[:, None] * self.direction(state)

    def trained(self, sent: State, size: float = 1.0) -> State:
        """As after a round: everything has moved, each client another way."""
        magnitude = self.norm(sent).float() * (1 + 0.3 * size * self.random(OUT))
        return self.state(
            sent[self.a] + 0.3 * size * self.random(RANK, IN),
            sent[self.b] + 0.5 * size * self.random(OUT, RANK),
            magnitude,
        )


def one_round(
    layer: Layer, method: str, *, exact: bool, rounds: int = 1
) -> tuple[AdapterAggregator, float, float]:
    """The aggregator, and two distances of its result from the dense mean of the last round.

    The whole weight's and that of the magnitudes alone, relative to the mean's step from the base.
    """
    aggregator = AdapterAggregator(method, {"m": SCALE}, max_rank=CLIENTS * RANK * 4)
    aggregator.init(layer.initial)
    weights = [1.0, 2.0, 3.0, 0.5]
    for _ in range(rounds):
        sent = aggregator.distribute()
        returned = [layer.trained(sent) for _ in range(CLIENTS)]
        norms = {c: {"m": layer.norm(state).float()} for c, state in enumerate(returned)}
        updates = [
            AdapterUpdate(c, sent, state, weight)
            for c, (state, weight) in enumerate(zip(returned, weights, strict=True))
        ]
        dora = DoraMean(layer.initial, {"m": SCALE}, norms)
        aggregator.aggregate(updates, then=[dora] if exact else [])
    mean = sum(w * layer.effective(s) for w, s in zip(weights, returned, strict=True))
    mean = mean / sum(weights)  # type: ignore[operator]
    total = aggregator.deltas()["m"]
    delta = total.scale * total.B.double() @ total.A.double()
    direction = layer.weight + (delta.T if layer.embedding else delta)
    magnitude = aggregator.distribute()["m.lora_magnitude_vector"].double()
    found = (magnitude / direction.norm(dim=1))[:, None] * direction
    step = (mean - layer.weight).norm()
    return (
        aggregator,
        float((found - mean).norm() / step),
        float((magnitude - mean.norm(dim=1)).norm() / step),
    )


@pytest.mark.parametrize("method", ["product-delta", "flexlora"])
@pytest.mark.parametrize("embedding", [False, True], ids=["linear", "embedding"])
@pytest.mark.parametrize("begins_with_delta", [False, True], ids=["zero", "random"])
def test_dora_mean_is_the_exact_mean_of_the_clients_weights(
    method: str, embedding: bool, begins_with_delta: bool
) -> None:
    layer = Layer(embedding=embedding, begins_with_delta=begins_with_delta)
    _, error, magnitudes = one_round(layer, method, exact=True)
    assert error < 2e-6 and magnitudes < 2e-6
    _, error, magnitudes = one_round(layer, method, exact=False)
    assert error > 0.1 and magnitudes > 0.05  # the mean of the magnitudes is not


def test_dora_mean_without_training_changes_nothing() -> None:
    layer = Layer()
    aggregator, _, _ = one_round(layer, "product-delta", exact=True)
    sent = aggregator.distribute(ranks=CLIENTS * RANK * 4)
    norms = {c: {"m": layer.norm(sent).float()} for c in range(2)}
    updates = [AdapterUpdate(c, sent, sent, 1.0 + c) for c in range(2)]
    aggregator.aggregate(updates, then=[DoraMean(layer.initial, {"m": SCALE}, norms)])
    again = aggregator.distribute(ranks=CLIENTS * RANK * 4)
    torch.testing.assert_close(layer.effective(again), layer.effective(sent), rtol=0, atol=1e-5)


def test_dora_mean_of_clients_that_cancel_out_keeps_the_plain_means() -> None:
    layer, found = Layer(), []
    first = layer.trained(layer.initial)
    second = {**layer.trained(layer.initial)}
    # Magnitudes of opposite sign: what is left of the common direction is noise.
    opposite = first["m.lora_magnitude_vector"].double() / layer.norm(first) * layer.norm(second)
    second["m.lora_magnitude_vector"] = (-(1 - 1e-6) * opposite).float()
    for exact in (True, False):
        aggregator = AdapterAggregator("product-delta", {"m": SCALE})
        aggregator.init(layer.initial)
        sent = aggregator.distribute()
        norms = {c: {"m": layer.norm(state).float()} for c, state in enumerate((first, second))}
        updates = [AdapterUpdate(c, sent, state, 1.0) for c, state in enumerate((first, second))]
        dora = DoraMean(layer.initial, {"m": SCALE}, norms)
        aggregator.aggregate(updates, then=[dora] if exact else [])
        found.append(aggregator.distribute())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_dora_mean_of_clients_that_were_sent_other_ranks_keeps_the_plain_means() -> None:
    layer = Layer()
    aggregator, _, _ = one_round(layer, "product-delta", exact=True)
    sent = [aggregator.distribute(ranks=rank) for rank in (1, 3)]
    magnitude = aggregator.distribute()["m.lora_magnitude_vector"]
    norms = {c: {"m": layer.norm(state).float()} for c, state in enumerate(sent)}
    updates = [AdapterUpdate(c, state, state, 1.0) for c, state in enumerate(sent)]
    aggregator.aggregate(updates, then=[DoraMean(layer.initial, {"m": SCALE}, norms)])
    assert torch.equal(aggregator.distribute()["m.lora_magnitude_vector"], magnitude)


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_norms_that_are_no_norms_name_the_client_and_the_module(value: float) -> None:
    raw = torch.full((OUT,), value).numpy().tobytes()
    with pytest.raises(AggregationError, match="client 'a' .* norms of m .*strategy.dora"):
        norms_from("a", {"m": raw}, Layer().initial)


@pytest.mark.parametrize("raw", [{}, {"m": b"\0\0\0\0"}, {"m": b"x" * (4 * OUT + 1)}])
def test_norms_of_another_shape_or_none_are_refused(raw: dict[str, bytes]) -> None:
    with pytest.raises(AggregationError, match="norms of m"):
        norms_from(7, raw, Layer().initial)


@pytest.mark.parametrize("method", ["flora", "fedex-lora", "fedsa-lora"])
def test_dora_with_a_method_that_it_does_not_fit_is_refused_by_name(method: str) -> None:
    with pytest.raises(AggregationError, match=f'"{method}" .*use-dora'):
        check_adapter(StrategyConfig(aggregator=method), Layer().initial)


def test_dora_mean_is_used_where_the_result_is_the_mean_of_the_deltas() -> None:
    adapter = Layer().initial
    assert fits_dora(StrategyConfig(), adapter)
    assert fits_dora(StrategyConfig(name="fedbuff"), adapter)
    assert not fits_dora(StrategyConfig(), {"m.lora_A.weight": torch.ones(1)})
    for other in (
        StrategyConfig(dora="mean"),
        StrategyConfig(aggregator="fedit"),
        StrategyConfig(rules="trimmed-mean=0.2"),
        StrategyConfig(server_learning_rate=0.5),
        StrategyConfig(server_optimizer="adam"),
        StrategyConfig(name="fedavg"),
    ):
        assert not fits_dora(other, adapter)
