"""Whole adapters: names, layers, other tensors, policies, checkpoints, the base's change."""

import re

import pytest
import torch
from safetensors.torch import load, save

from flower_split.aggregation import METHODS
from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterUpdate
from flower_split.aggregation.rules.parse import parse_rules
from flower_split.errors import AggregationError
from tests.support.dense_reference import generator, relative

ALL = sorted(METHODS)
Q, EMB, CONV = "model.layers.0.self_attn.q_proj", "model.embed_tokens", "model.conv"
SCALES = {Q: 2.0, EMB: 0.5, CONV: 1.0}


def adapter(seed=0, rank=3):
    rng = generator(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng) / shape[-1] ** 0.5

    return {
        f"{Q}.lora_A.weight": normal(rank, 12),
        f"{Q}.lora_B.weight": torch.zeros(10, rank),
        f"{Q}.lora_B.bias": torch.zeros(10),
        f"{EMB}.lora_embedding_A": torch.zeros(rank, 30),
        f"{EMB}.lora_embedding_B": normal(12, rank),
        f"{CONV}.lora_A.weight": normal(rank, 5, 2, 2),
        f"{CONV}.lora_B.weight": torch.zeros(6, rank, 1, 1),
        "model.norm.weight": torch.ones(12),
    }


def started(name="product-delta", **options):
    aggregator = AdapterAggregator(name, SCALES, **options)
    aggregator.init(adapter())
    return aggregator


def moved(received, rng, size=0.2, names=None):
    return {
        name: value + size * torch.randn(value.shape, generator=rng)
        if names is None or name in names
        else value.clone()
        for name, value in received.items()
    }


def played(aggregator, seed=0, number=3, size=0.2):
    received = aggregator.distribute()
    rng = generator(100 + seed)
    return [
        AdapterUpdate(
            f"c{index}", received, moved(received, rng, size, aggregator.trainable()), index + 1
        )
        for index in range(number)
    ]


def dense_of(tensors, scales=SCALES):
    """Every module's ΔW as PEFT adds it to the weight, and the bias and norm as they count."""
    q = tensors[f"{Q}.lora_B.weight"].double() @ tensors[f"{Q}.lora_A.weight"].double()
    emb_a, emb_b = tensors[f"{EMB}.lora_embedding_A"], tensors[f"{EMB}.lora_embedding_B"]
    conv_a = tensors[f"{CONV}.lora_A.weight"].double().flatten(1)
    conv_b = tensors[f"{CONV}.lora_B.weight"].double().flatten(1)
    return {
        Q: scales[Q] * q,
        EMB: scales[EMB] * (emb_b.double() @ emb_a.double()).T,
        CONV: scales[CONV] * (conv_b @ conv_a),
        "bias": scales[Q] * tensors[f"{Q}.lora_B.bias"].double(),
        "norm": tensors["model.norm.weight"].double(),
    }


def test_every_kind_of_layer_merges_to_the_weighted_mean():
    aggregator = started(max_rank=12)
    updates = played(aggregator)
    aggregator.aggregate(updates)
    found = dense_of(aggregator.distribute(ranks=9))
    means = {}
    for update in updates:
        for key, value in dense_of(update.returned).items():
            means[key] = means.get(key, 0) + value * update.weight / 6
    for key, mean in means.items():
        assert relative(found[key], mean) < 1e-6, key


def test_distributed_adapter_has_the_names_shapes_and_order_of_the_initial_one():
    for name in ALL:
        aggregator = started(name)
        sent = aggregator.distribute()
        assert list(sent) == sorted(adapter()), name
        assert all(torch.equal(sent[key], value) for key, value in adapter().items()), name
        aggregator.aggregate(played(aggregator))
        sent = aggregator.distribute()
        assert {key: value.shape for key, value in sent.items()} == {
            key: value.shape for key, value in adapter().items()
        }, name
        assert all(value.dtype == torch.float32 for value in sent.values())
        assert all(value.is_contiguous() for value in sent.values())


def test_clients_of_mixed_ranks_and_scales_merge_exactly():
    aggregator = started(max_rank=12)
    others = {Q: 7.0, EMB: 2.0, CONV: 0.3}
    rng = generator(5)
    updates = []
    for index, (rank, scales) in enumerate([(1, None), (3, None), (5, others)]):
        received = aggregator.distribute(rank, scales)
        assert received[f"{Q}.lora_A.weight"].shape[0] == rank
        updates.append(AdapterUpdate(index, received, moved(received, rng), 1, scales))
    aggregator.aggregate(updates)
    found = dense_of(aggregator.distribute(12))
    for key in found:
        mean = sum(dense_of(one.returned, one.scales or SCALES)[key] for one in updates) / 3
        assert relative(found[key], mean) < 1e-6, key


def test_ranks_may_differ_by_module():
    aggregator = started()
    sent = aggregator.distribute({Q: 2, CONV: 5})
    assert sent[f"{Q}.lora_A.weight"].shape == (2, 12)
    assert sent[f"{CONV}.lora_A.weight"].shape == (5, 5, 2, 2)
    assert sent[f"{EMB}.lora_embedding_A"].shape == (3, 30)


@pytest.mark.parametrize("name", ALL)
def test_order_of_clients_and_number_of_workers_change_no_bit(name):
    one, two = started(name), started(name, workers=3)
    for server_round in range(2):
        updates = played(one, seed=server_round)
        summary = one.aggregate(updates)
        assert summary.clients == ("c0", "c1", "c2")
        two.aggregate([updates[2], updates[0], updates[1]])
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_clients_are_summed_in_the_order_of_numbers():
    aggregator = started()
    (update,) = played(aggregator, number=1)
    ids = [10, 9, 2, 1]
    updates = [AdapterUpdate(i, update.received, update.returned, 1) for i in ids]
    assert aggregator.aggregate(updates).clients == (1, 2, 9, 10)


@pytest.mark.parametrize("name", ALL)
def test_run_continues_from_a_checkpoint_bit_for_bit(name):
    one = started(name)
    one.aggregate(played(one))
    two = AdapterAggregator(name, SCALES)
    two.load_state_dict(load(save(one.state_dict())), adapter())
    for server_round in range(2):
        updates = played(one, seed=server_round + 1)
        one.aggregate(updates)
        two.aggregate(updates)
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_base_changes_add_up_over_rounds(name):
    aggregator = started(name)
    total = {module: 0 for module in SCALES}
    for server_round in range(3):
        before = {m: f.scale * f.B.double() @ f.A.double() for m, f in aggregator.deltas().items()}
        updates = played(aggregator, seed=server_round)
        for module in SCALES:
            mean = sum(dense_of(one.returned)[module] * one.weight / 6 for one in updates)
            total[module] = total[module] + mean - before[module]
        aggregator.aggregate(updates)
    for module, delta in aggregator.deltas().items():
        base = aggregator.base_changes()[module]
        found = delta.scale * delta.B.double() @ delta.A.double()
        found = found + base.scale * base.B.double() @ base.A.double()
        assert relative(found, total[module]) < 1e-6


def test_methods_without_residual_change_no_base():
    aggregator = started("product-delta")
    aggregator.aggregate(played(aggregator))
    assert aggregator.base_changes() == {}


@pytest.mark.parametrize("name", ["ffa-lora", "rolora", "fedsvd", "fedsa-lora"])
def test_frozen_and_private_tensors_need_not_come_back(name):
    one, two = started(name), started(name)
    updates = played(one)
    optional = set(adapter()) - set(one.trainable()) | set(one.private())
    assert optional
    short = []
    for update in updates:
        kept = {
            key: update.received[key] if key in set(one.private()) else value
            for key, value in update.returned.items()
        }
        slim = {key: value for key, value in update.returned.items() if key not in optional}
        short.append(AdapterUpdate(update.client_id, update.received, slim, update.weight))
        update.returned.clear()
        update.returned.update(kept)
    one.aggregate(updates)
    two.aggregate(short)
    first, second = one.state_dict(), two.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_trainable_names_the_layers_own_factors():
    names = started("ffa-lora").trainable()
    assert names == sorted(
        [
            f"{Q}.lora_B.weight",
            f"{Q}.lora_B.bias",
            f"{EMB}.lora_embedding_A",  # the factor that starts at 0
            f"{CONV}.lora_B.weight",
            "model.norm.weight",
        ]
    )


def broken(updates, kind):
    """The updates with the second client's broken in some way."""
    bad = updates[1]
    returned = dict(bad.returned)
    weight = bad.weight
    if kind == "nan":
        returned[f"{CONV}.lora_B.weight"] = returned[f"{CONV}.lora_B.weight"] * float("nan")
    elif kind == "nan norm":
        returned["model.norm.weight"] = returned["model.norm.weight"] * float("inf")
    elif kind == "missing":
        del returned[f"{Q}.lora_B.weight"]
    elif kind == "unexpected":
        returned["head.weight"] = torch.ones(2)
    elif kind == "shape":
        returned["model.norm.weight"] = torch.ones(1)
    elif kind == "rank 1":
        returned[f"{Q}.lora_A.weight"] = returned[f"{Q}.lora_A.weight"][:1]
        returned[f"{Q}.lora_B.weight"] = returned[f"{Q}.lora_B.weight"][:, :1]
    elif kind == "negative":
        weight = -5
    return [
        updates[0],
        AdapterUpdate(bad.client_id, bad.received, returned, weight),
        *updates[2:],
    ]


KINDS = ["nan", "nan norm", "missing", "unexpected", "shape", "rank 1", "negative"]


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_update_is_refused_by_name_and_changes_nothing(kind):
    aggregator = started()
    before = {key: value.clone() for key, value in aggregator.state_dict().items()}
    with pytest.raises(AggregationError, match="client 'c1'"):
        aggregator.aggregate(broken(played(aggregator), kind))
    after = aggregator.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", KINDS)
def test_excluded_update_leaves_the_result_of_the_honest_clients_alone(kind):
    one, two = started(on_invalid="exclude"), started()
    updates = played(one)
    summary = one.aggregate(broken(updates, kind))
    assert summary.clients == ("c0", "c2")
    assert re.search("client 'c1'", summary.excluded["c1"])
    two.aggregate([updates[0], updates[2]])
    first, second = one.state_dict(), two.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_round_of_nothing_but_malformed_updates_is_refused():
    aggregator = started(on_invalid="exclude")
    with pytest.raises(AggregationError, match="no client update.*'c1'"):
        aggregator.aggregate(broken(played(aggregator), "nan")[1:2])


def test_client_that_appears_twice_is_refused():
    aggregator = started()
    updates = played(aggregator)
    with pytest.raises(AggregationError, match="'c0' is in this round twice"):
        aggregator.aggregate([*updates, updates[0]])


def test_module_without_scale_is_refused():
    aggregator = AdapterAggregator("fedit", {Q: 1.0})
    with pytest.raises(AggregationError, match=f"no scale for {CONV}, {EMB}"):
        aggregator.init(adapter())


def test_half_a_module_is_refused():
    half = adapter()
    del half[f"{Q}.lora_B.weight"]
    with pytest.raises(AggregationError, match=f"not {Q}.lora_B.weight"):
        started().init(half)


def test_use_before_init_is_refused():
    with pytest.raises(AggregationError, match="call init first"):
        AdapterAggregator("fedit", SCALES).distribute()


def test_rules_run_before_the_method_on_the_whole_adapter():
    one, two = started(transforms=parse_rules("multi-krum=1")), started()
    updates = played(one, number=6)
    far = played(two, seed=9, number=6, size=5.0)[4]
    one.aggregate([*updates[:4], far, updates[5]])
    two.aggregate([*updates[:4], updates[5]])
    first, second = one.state_dict(), two.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_server_keeps_four_times_the_adapters_rank_unless_told():
    aggregator = started()
    for server_round in range(4):
        aggregator.aggregate(played(aggregator, seed=server_round))
    ranks = {module: factors.rank for module, factors in aggregator.deltas().items()}
    assert ranks == {Q: 10, EMB: 12, CONV: 6}  # 4 · 3, or what the layer's size allows


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_sums_on_the_gpu_equal_those_on_the_cpu(name):
    one, two = started(name), started(name, device="cuda")
    updates = played(one)  # one round: the signs of singular vectors may differ from then on
    one.aggregate(updates)
    two.aggregate(updates)
    for module, delta in one.deltas().items():
        other = two.deltas()[module]
        expected = delta.scale * delta.B.double() @ delta.A.double()
        found = other.scale * other.B.double() @ other.A.double()
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    stored = two.state_dict()
    assert all(value.device.type == "cpu" for value in stored.values())
    back = AdapterAggregator(name, SCALES, device="cuda")
    back.load_state_dict(stored, adapter())
    first, second = two.distribute(), back.distribute()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_truncation_is_what_an_adapter_of_the_initial_rank_leaves_out():
    aggregator = started()
    assert aggregator.truncation() == 0
    summary = aggregator.aggregate(played(aggregator))
    whole = left = 0.0
    for delta in aggregator.deltas().values():
        values = torch.linalg.svdvals(delta.scale * delta.B.double() @ delta.A.double())
        whole += float(values.square().sum())
        left += float(values[3:].square().sum())
    assert left > 0.01 * whole
    assert summary.truncation == pytest.approx((left / whole) ** 0.5, rel=1e-5)
    assert started("fedit").aggregate(played(started("fedit"))).truncation == 0


def test_truncation_is_zero_where_the_server_keeps_no_more_than_the_adapter():
    aggregator = started(max_rank=3)
    assert aggregator.aggregate(played(aggregator)).truncation == 0
