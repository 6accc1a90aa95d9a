"""A client that moves its adapter far more than the others is left out, or refuses the round."""

from dataclasses import replace

import pytest
import torch

from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterUpdate
from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.aggregation.core.factors import Factors, Update
from flower_split.aggregation.core.outliers import Outliers, above_median, median, moved
from flower_split.errors import AggregationError

NAME = "model.layers.0.q_proj"
INITIAL = {f"{NAME}.lora_A.weight": torch.eye(2, 3), f"{NAME}.lora_B.weight": torch.zeros(4, 2)}


def returned(size: float) -> dict[str, torch.Tensor]:
    moved_b = torch.zeros(4, 2)
    moved_b[0, 0] = size  # ΔW has one entry, of 2.0 * size at scale 2
    return {**INITIAL, f"{NAME}.lora_B.weight": moved_b}


def aggregated(name: str = "product-delta", *sizes: float, weights=None, **options):
    aggregator = AdapterAggregator(name, {NAME: 2.0}, **options)
    aggregator.init(INITIAL)
    weights = weights or [1.0] * len(sizes)
    updates = [
        AdapterUpdate(index, aggregator.distribute(), returned(size), weight)
        for index, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    return aggregator, aggregator.aggregate(updates[::-1])


def test_median_of_an_even_number_is_the_upper_one_which_a_minority_cannot_raise():
    assert median({0: 1.0, 1: 4.0, 2: 2.0, 3: 3.0}) == 3.0
    assert above_median({0: 1.0, 1: 1.0, 2: 1.0, 3: 1e9}, 10.0) == {3: 1e9}
    assert above_median({0: 1.0, 1: 1e9, 2: 1e9, 3: 1.0, 4: 1.0}, 10.0) == {1: 1e9, 2: 1e9}


def test_change_of_the_product_is_measured_however_it_is_factored():
    sent = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [0.0]]), 2.0)
    back = Factors(torch.tensor([[30.0, 40.0]]), torch.tensor([[0.1], [0.0]]), 2.0)
    client = ClientUpdate(0, 1.0, {NAME: Update(0, sent, back, 1.0)})
    assert moved(client, factors=False) == pytest.approx(10.0)  # 2 * 0.1 * |(30, 40)|
    # By itself A moved by (29, 40), and B by 0.1.
    assert moved(client, factors=True) == pytest.approx((29**2 + 40**2 + 0.01) ** 0.5, rel=1e-6)


def test_other_tensors_count_beside_the_modules():
    one = {"norm.weight": (torch.zeros(2, dtype=torch.float64), torch.tensor([3.0, 4.0]).double())}
    assert moved(ClientUpdate(0, 1.0, {}, one), factors=False) == 5.0


@pytest.mark.parametrize("name", ["product-delta", "fedit", "flora", "fedsa-lora", "flexlora"])
def test_outlier_that_is_excluded_leaves_the_result_of_the_others_bit_for_bit(name):
    sizes = (1.0, 1.5, 0.5)
    private = name == "fedsa-lora"

    def run(*with_sizes: float, **options: object):
        if not private:
            return aggregated(name, *with_sizes, **options)
        aggregator = AdapterAggregator(name, {NAME: 2.0}, **options)
        aggregator.init(INITIAL)
        sent = aggregator.distribute()
        a = f"{NAME}.lora_A.weight"
        updates = [
            AdapterUpdate(i, sent, {a: sent[a] + size}, 1.0) for i, size in enumerate(with_sizes)
        ]
        return aggregator, aggregator.aggregate(updates)

    wanted, _ = run(*sizes)
    found, summary = run(*sizes, 100.0, on_invalid="exclude", outlier_factor=20.0)
    assert summary.clients == (0, 1, 2)
    assert "times the median" in summary.excluded[3] and "client 3" in summary.excluded[3]
    one, two = wanted.state_dict(), found.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_outlier_refuses_the_round_by_default_and_names_the_client():
    with pytest.raises(AggregationError, match=r"client 3 moved .* 100 times .*outlier-factor"):
        aggregated("product-delta", 1.0, 1.0, 1.0, 100.0, outlier_factor=20.0)


def test_no_bound_between_two_clients_nor_where_the_factor_is_zero():
    aggregated("product-delta", 1.0, 1e6, outlier_factor=20.0)
    aggregated("product-delta", 1.0, 1.0, 1e6, outlier_factor=0.0)


def test_client_of_ten_times_the_tokens_may_move_ten_times_as_far():
    given = (1.0, 1.0, 1.0, 150.0)
    aggregated("product-delta", *given, weights=[1.0, 1.0, 1.0, 10.0], outlier_factor=20.0)
    with pytest.raises(AggregationError, match="client 3"):
        aggregated("product-delta", *given, weights=[1.0, 1.0, 1.0, 5.0], outlier_factor=20.0)


def test_who_is_far_depends_on_no_order():
    update = Update(
        0,
        Factors(torch.ones(1, 2), torch.zeros(2, 1)),
        Factors(torch.ones(1, 2), torch.ones(2, 1)),
        1.0,
    )
    clients = []
    for index, size in enumerate((1.0, 50.0, 2.0, 3.0)):
        back = replace(update.returned, B=update.returned.B * size)
        clients.append(ClientUpdate(index, 1.0, {NAME: replace(update, returned=back)}))
    judge = Outliers(10.0)
    assert list(judge(clients)) == [1]
    assert judge(clients) == judge(clients[::-1])
