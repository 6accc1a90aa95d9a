"""What is refused, what is taken, and what is left alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch.utils._python_dispatch import TorchDispatchMode

from flower_split.aggregation import METHODS, Factors, Update, make_aggregator
from flower_split.errors import AggregationError
from tests.support.dense_reference import IN, OUT, dense, initial, merged, play, relative

ALL = sorted(METHODS)


def round_of(name, **options):
    aggregator = make_aggregator(name)
    state = aggregator.init(initial())
    return aggregator, state, play(name, aggregator, state, **options)


def with_value(tensor, value):
    changed = tensor.clone()
    changed[1, 2] = value
    return changed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("name", ALL)
def test_non_finite_factors_are_refused_and_name_the_client(name, part, value):
    aggregator, state, updates = round_of(name)
    returned = updates[1].returned
    parts = {"A": returned.A, "B": returned.B}
    parts[part] = with_value(parts[part], value)
    updates[1] = replace(updates[1], returned=Factors(**parts, scale=returned.scale))
    with pytest.raises(AggregationError, match=rf"'client-1' returned.*NaN or Inf in {part}"):
        aggregator.aggregate(state, updates)


@pytest.mark.parametrize("name", ALL)
def test_finite_factors_of_a_delta_beyond_fp32_are_refused_and_name_the_client(name):
    aggregator, state, updates = round_of(name)
    returned = updates[1].returned  # finite each; their product is not, in fp32
    returned = Factors(returned.A * 1e25, returned.B * 1e25, returned.scale)
    updates[1] = replace(updates[1], returned=returned)
    with pytest.raises(AggregationError, match="'client-1' returned.*beyond the largest number"):
        aggregator.aggregate(state, updates)


@pytest.mark.parametrize("weight", [-1, -0.5, float("nan"), float("inf"), 10**400, "3", None, True])
@pytest.mark.parametrize("name", ALL)
def test_invalid_weight_is_refused_and_names_the_client(name, weight):
    aggregator, state, updates = round_of(name)
    updates[2] = replace(updates[2], weight=weight)
    with pytest.raises(AggregationError, match="'client-2' has weight"):
        aggregator.aggregate(state, updates)


@pytest.mark.parametrize("name", ALL)
def test_all_zero_weights_are_refused_and_name_the_clients(name):
    aggregator, state, updates = round_of(name)
    updates = [replace(update, weight=0) for update in updates]
    with pytest.raises(AggregationError, match="'client-0', 'client-1', 'client-2'"):
        aggregator.aggregate(state, updates)


@pytest.mark.parametrize("name", ALL)
def test_round_without_clients_is_refused(name):
    aggregator, state, _ = round_of(name)
    with pytest.raises(AggregationError, match="at least one"):
        aggregator.aggregate(state, [])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4, IN + 1), (OUT, 4)),
        ((4, IN), (OUT - 1, 4)),
        ((4, IN), (OUT, 3)),
        ((1, IN), (OUT, 4)),
        ((4 * IN,), (OUT, 4)),
        ((4, IN, 1), (OUT, 4)),
        ((0, IN), (OUT, 0)),
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_wrong_shapes_are_refused_and_name_the_client(name, a, b):
    aggregator, state, updates = round_of(name)
    updates[0] = replace(updates[0], returned=Factors(torch.ones(a), torch.ones(b), 2.0))
    with pytest.raises(AggregationError, match="'client-0' returned"):
        aggregator.aggregate(state, updates)


@pytest.mark.parametrize("name", ALL)
def test_changed_rank_is_refused_and_names_the_client(name):
    aggregator, state, updates = round_of(name)
    updates[0] = replace(updates[0], returned=initial(rank=3))
    with pytest.raises(AggregationError, match="'client-0' received factors of rank 4.*rank 3"):
        aggregator.aggregate(state, updates)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), None])
@pytest.mark.parametrize("name", ["fedit", "product-delta"])
def test_invalid_scale_is_refused_and_names_the_client(name, scale):
    aggregator, state, updates = round_of(name)
    own = updates[1].returned
    updates[1] = replace(updates[1], returned=Factors(own.A, own.B, scale))
    with pytest.raises(AggregationError, match="'client-1' returned.*scale"):
        aggregator.aggregate(state, updates)


def test_integer_factors_are_refused():
    aggregator, state, updates = round_of("fedit")
    own = updates[1].returned
    updates[1] = replace(updates[1], returned=Factors(own.A.long(), own.B, own.scale))
    with pytest.raises(AggregationError, match=r"'client-1' returned.*torch\.int64"):
        aggregator.aggregate(state, updates)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_taken_and_summed_in_fp32_or_better(dtype):
    aggregator, state, updates = round_of("flexlora")
    own = [update.returned for update in updates]
    cast = [
        replace(update, returned=Factors(one.A.to(dtype), one.B.to(dtype), one.scale))
        for update, one in zip(updates, own, strict=True)
    ]
    exact = sum(
        one.scale * (one.B.to(dtype).double() @ one.A.to(dtype).double()) * (update.weight / 8)
        for update, one in zip(updates, own, strict=True)
    )
    found = aggregator.delta(aggregator.aggregate(state, cast).state)
    assert found.A.dtype == found.B.dtype == torch.float32
    assert relative(dense(found), exact) < 1e-6


def test_parameters_and_numpy_weights_are_taken():
    aggregator, state, updates = round_of("fedit")
    first = merged(aggregator, aggregator.aggregate(state, updates))
    odd = [
        replace(
            update,
            returned=Factors(
                torch.nn.Parameter(update.returned.A), update.returned.B, update.returned.scale
            ),
            weight=kind(update.weight),
        )
        for update, kind in zip(updates, (np.float32, np.int64, torch.tensor), strict=True)
    ]
    assert torch.equal(merged(aggregator, aggregator.aggregate(state, odd)), first)


@pytest.mark.parametrize("name", ALL)
def test_aggregation_leaves_its_inputs_alone(name):
    aggregator, state, updates = round_of(name)
    state = aggregator.aggregate(state, updates).state
    updates = play(name, aggregator, state, server_round=1)

    def everything():
        tensors = list(aggregator.state_dict(state).values())
        for update in updates:
            for factors in (update.received, update.returned):
                tensors += [factors.A, factors.B]
        return tensors

    before = [tensor.clone() for tensor in everything()]
    result = aggregator.aggregate(state, updates)
    aggregator.distribute(result.state, 4, 1.0).A.zero_()
    aggregator.distribute(state, 4, 2.0).A.zero_()
    aggregator.distribute(state, 4, 2.0).B.zero_()
    assert all(torch.equal(one, two) for one, two in zip(before, everything(), strict=True))


def test_init_keeps_its_own_copy():
    for name in ALL:
        aggregator, factors = make_aggregator(name), initial()
        state = aggregator.init(factors)
        factors.A.zero_()
        assert aggregator.distribute(state, 4, 2.0).A.any(), name


class LargestOutput(TorchDispatchMode):
    """Records the largest "both dimensions" of any tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and one.dim() >= 2:
                self.largest = max(self.largest, min(one.shape[-2:]))
        return out


@pytest.mark.parametrize("name", ALL)
def test_no_operation_makes_a_tensor_of_the_weights_size(name):
    rows, columns, rank = 96, 80, 4
    aggregator = make_aggregator(name, max_rank=rank if name != "flora" else None)
    rng = torch.Generator().manual_seed(0)
    with LargestOutput() as record:
        start = Factors(torch.randn(rank, columns, generator=rng), torch.zeros(rows, rank), 1.0)
        state = aggregator.init(start)
        for _ in range(3):
            received = aggregator.distribute(state, rank, 1.0)
            updates = [
                Update(
                    i,
                    received,
                    Factors(
                        received.A + torch.randn(rank, columns, generator=rng),
                        received.B + torch.randn(rows, rank, generator=rng),
                        1.0,
                    ),
                    1,
                )
                for i in range(5)
            ]
            result = aggregator.aggregate(state, updates)
            state = result.state
            aggregator.delta(state)
    assert rank <= record.largest <= 2 * 5 * rank + 2 * rank < columns


@pytest.mark.parametrize("name", ALL)
def test_state_survives_a_checkpoint_bit_for_bit(name):
    aggregator, state, updates = round_of(name)
    state = aggregator.aggregate(state, updates).state
    stored = aggregator.state_dict(state)
    back = make_aggregator(name).load_state_dict(load(save(stored)))
    updates = play(name, aggregator, state, server_round=1)
    first = aggregator.state_dict(aggregator.aggregate(state, updates).state)
    second = aggregator.state_dict(aggregator.aggregate(back, updates).state)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_damaged_checkpoint_is_refused():
    aggregator, state, _ = round_of("fedit")
    stored = aggregator.state_dict(state)
    del stored["basis"]
    with pytest.raises(AggregationError, match="lacks 'basis'"):
        aggregator.load_state_dict(stored)


def test_unknown_method_names_the_nearest():
    with pytest.raises(AggregationError, match="Did you mean 'flexlora'"):
        make_aggregator("flexlroa")


def test_unknown_option_names_the_known_ones():
    with pytest.raises(AggregationError, match="no option 'momentum'.*learning_rate"):
        make_aggregator("fedit", momentum=0.9)


@pytest.mark.parametrize("name", ["fedit", "hetlora", "lora-fair", "fedex-lora", "flora"])
def test_learning_rate_is_refused_where_the_mean_is_not_linear(name):
    assert make_aggregator(name, learning_rate=1.0).learning_rate == 1
    with pytest.raises(AggregationError, match=f"{name} takes no server learning rate"):
        make_aggregator(name, learning_rate=0.5)


@pytest.mark.parametrize("name", ["ffa-lora", "rolora", "fedsvd", "flexlora", "product-delta"])
def test_learning_rate_scales_the_step_on_the_global_update(name):
    plain, half = make_aggregator(name), make_aggregator(name, learning_rate=0.5)
    state = plain.init(initial())
    state = plain.aggregate(state, play(name, plain, state)).state
    updates = play(name, plain, state, server_round=1)
    before = dense(plain.delta(state))
    full = merged(plain, plain.aggregate(state, updates)) - before
    found = merged(half, half.aggregate(state, updates)) - before
    assert relative(found, 0.5 * full) < 1e-5


def test_option_of_the_wrong_type_is_refused():
    with pytest.raises(AggregationError, match="product-delta: an option has the wrong type"):
        make_aggregator("product-delta", learning_rate="fast")


@pytest.mark.parametrize(
    "options",
    [{"max_rank": 2.5}, {"max_rank": True}, {"seed": None}, {"seed": 0.5}, {"seed": 2**70}],
)
def test_rank_or_seed_that_is_no_integer_is_refused(options):
    with pytest.raises(AggregationError, match="must be an integer"):
        make_aggregator("product-delta", **options)


@pytest.mark.parametrize("options", [{"max_rank": 0}, {"learning_rate": 0}, {"learning_rate": -1}])
def test_option_out_of_range_is_refused(options):
    with pytest.raises(AggregationError, match=next(iter(options))):
        make_aggregator("product-delta", **options)


factors_values = st.integers(min_value=0, max_value=2**31)


@settings(max_examples=25, deadline=None)
@given(
    seed=factors_values,
    ranks=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    data=st.data(),
)
@pytest.mark.parametrize("name", ["flexlora", "product-delta", "flora"])
def test_product_methods_equal_the_dense_mean_for_any_federation(name, seed, ranks, data):
    rng = torch.Generator().manual_seed(seed)
    out, into = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    weights = data.draw(
        st.lists(
            st.one_of(st.just(0), st.floats(1e-3, 1e6)), min_size=len(ranks), max_size=len(ranks)
        ).filter(any)
    )
    scales = data.draw(st.lists(st.floats(0.01, 100), min_size=len(ranks), max_size=len(ranks)))
    aggregator = make_aggregator(name)
    start = Factors(torch.randn(3, into, generator=rng), torch.zeros(out, 3), 1.0)
    state = aggregator.init(start)
    updates = []
    for index, (rank, scale, weight) in enumerate(zip(ranks, scales, weights, strict=True)):
        received = aggregator.distribute(state, rank, scale)
        returned = Factors(
            torch.randn(rank, into, generator=rng), torch.randn(out, rank, generator=rng), scale
        )
        updates.append(Update(index, received, returned, weight))
    total = sum(weights)
    expected = sum(
        update.returned.scale
        * (update.returned.B.double() @ update.returned.A.double())
        * (update.weight / total)
        for update in updates
    )
    result = aggregator.aggregate(state, updates)
    found = aggregator.delta(result.state)
    dense_found = found.scale * (found.B.double() @ found.A.double())
    if result.residual is not None:
        dense_found += result.residual.B.double() @ result.residual.A.double()
    assert float((dense_found - expected).norm()) <= 1e-6 * float(expected.norm())
