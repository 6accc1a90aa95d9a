"""Memory bounded by ranks, and speed against the dense computation."""

import json
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flower_split.aggregation import Factors, Update, make_aggregator
from flower_split.aggregation.core.lowrank import LowRankSum, svd_of_product
from tests.support.dense_reference import relative

STREAMING = ["flexlora", "florist", "product-delta", "flora", "fedex-lora", "raflora"]


class LongestSide(TorchDispatchMode):
    """Records the longest side of any tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.longest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and one.dim():
                self.longest = max(self.longest, *one.shape)
        return out


def federation(size, out, into, rank, seed=0, move=0.1):
    """An initial adapter and what ``size`` clients make of it, all sent the same factors."""
    rng = torch.Generator().manual_seed(seed)
    start = Factors(torch.randn(rank, into, generator=rng) / into**0.5, torch.zeros(out, rank), 2.0)
    updates = [
        Update(
            index,
            start,
            Factors(
                start.A + move * torch.randn(rank, into, generator=rng) / into**0.5,
                move * torch.randn(out, rank, generator=rng),
                2.0,
            ),
            index + 1,
        )
        for index in range(size)
    ]
    return start, updates


def dense_mean(updates, dtype=torch.float64):
    total = sum(update.weight for update in updates)
    mean = torch.zeros(
        updates[0].returned.out_features, updates[0].returned.in_features, dtype=dtype
    )
    for update in updates:
        own = update.returned
        mean += own.scale * update.weight / total * (own.B.to(dtype) @ own.A.to(dtype))
    return mean


@pytest.mark.parametrize("name", STREAMING)
def test_working_memory_does_not_grow_with_the_number_of_clients(name):
    start, updates = federation(300, 40, 32, 4)
    aggregator = make_aggregator(name)
    state = aggregator.init(start)
    with LongestSide() as record:
        result = aggregator.aggregate(state, updates)
    assert record.longest <= 2 * 32 + 8 < 300 * 4
    found = aggregator.delta(result.state)
    merged = found.scale * (found.B.double() @ found.A.double())
    if result.residual is not None:
        merged += result.residual.B.double() @ result.residual.A.double()
    if name != "raflora":  # keeps the rank of its clients
        assert relative(merged, dense_mean(updates)) < 1e-6


def test_working_rank_bounds_memory_below_the_size_of_the_weight():
    start, updates = federation(60, 300, 260, 4)
    aggregator = make_aggregator("product-delta", max_rank=8, working_rank=16)
    state = aggregator.init(start)
    total = LowRankSum(300, 260, working_rank=16)
    for update in updates:
        total.add(update.returned, 1.0)
        assert total.product()[1].shape[0] <= 2 * 16
    assert aggregator.aggregate(state, updates).state.factors.rank == 8


def test_svd_of_a_product_equals_the_dense_svd_with_repeated_and_lost_directions():
    rng = torch.Generator().manual_seed(3)
    p = torch.randn(20, 6, generator=rng, dtype=torch.float64)
    q = torch.randn(6, 15, generator=rng, dtype=torch.float64)
    p[:, 3] = p[:, 0]  # the same column twice
    q[4] = 0  # a component that is not there
    p[:, 5] *= 1e-6  # and a faint one
    found = svd_of_product(p, q)
    assert found.S.numel() == 4
    assert torch.allclose(found.S, torch.linalg.svdvals(p @ q)[:4], rtol=1e-9)
    assert relative((found.U * found.S) @ found.Vh, p @ q) < 1e-12
    assert relative(found.U.T @ found.U, torch.eye(4, dtype=torch.float64)) < 1e-8
    assert relative(found.Vh @ found.Vh.T, torch.eye(4, dtype=torch.float64)) < 1e-8


MEASURE = """
import json, resource, sys, torch
sys.path[:0] = [{here!r}]
from test_scale import federation
from flower_split.aggregation import make_aggregator
torch.set_num_threads(1)
start, updates = federation(1000, 1024, 1024, 16)
aggregator = make_aggregator({name!r}, max_rank=64)
state = aggregator.init(start)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
aggregator.aggregate(state, updates)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps((after - before) / 1024))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["product-delta", "flexlora", "fedex-lora", "fedit"])
def test_thousand_clients_aggregate_below_a_gigabyte(name, request):
    script = MEASURE.format(here=str(request.path.parent), name=name)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    megabytes = json.loads(done.stdout)
    print(f"{name}: {megabytes:.0f} MB over the baseline for 1000 clients")
    assert megabytes < 1000


@pytest.mark.slow
def test_sixteen_clients_of_width_4096_aggregate_fifty_times_faster_than_dense(capsys):
    start, updates = federation(16, 4096, 4096, 16, move=0.01)
    began = time.perf_counter()
    mean = dense_mean(updates, torch.float32)
    torch.linalg.svd(mean, full_matrices=False)
    dense_seconds = time.perf_counter() - began
    exact = dense_mean(updates)
    for name in ("flexlora", "product-delta"):
        aggregator = make_aggregator(name)
        state = aggregator.init(start)
        found = aggregator.delta(aggregator.aggregate(state, updates).state)
        error = relative(found.scale * (found.B.double() @ found.A.double()), exact)
        aggregator = make_aggregator(name, max_rank=16)
        began = time.perf_counter()
        aggregator.aggregate(state, updates)
        seconds = time.perf_counter() - began
        with capsys.disabled():
            print(
                f"\n{name}: {seconds * 1e3:.0f} ms, dense {dense_seconds:.1f} s, "
                f"{dense_seconds / seconds:.0f} times faster, error {error:.1e}"
            )
        assert error < 2e-6
        assert dense_seconds / seconds > 50
