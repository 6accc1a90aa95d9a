"""Seconds to aggregate one module's LoRA: this package's linear algebra beside a dense SVD.

Every client returns factors of rank r of a matrix [size, size]; the server takes the weighted mean of
their products, and its best matrix of rank r goes to the clients. The dense way, which is how the
papers' code computes it, forms the mean and takes its SVD. The methods never form it: QR of the
concatenated factors, and an SVD of a core of rank times clients. ``fedit`` averages the factors, which
is another matrix, and shows what the cheapest method takes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from flower_split.aggregation import Aggregator, Factors, Update, make_aggregator
from flower_split.bench.figures import Figures, Row
from flower_split.bench.machine import describe_machine
from flower_split.bench.turns import in_turns

DENSE = "dense SVD"
_SCALE = 2.0  # of the factors, as alpha / r


@dataclass(frozen=True, kw_only=True, slots=True)
class AggregationBench:
    """What is measured: every method for every combination."""

    methods: tuple[str, ...] = ("product-delta", "flexlora", "fedit")
    sizes: tuple[int, ...] = (512, 1024)
    ranks: tuple[int, ...] = (16,)
    clients: tuple[int, ...] = (4, 16)
    repeats: int = 3
    num_threads: int = 1


def measure_aggregation(bench: AggregationBench) -> Figures:
    """Time every combination, the ways of each in turns.

    Raises:
        AggregationError: There is no such method.
    """
    torch.set_num_threads(bench.num_threads)
    rows: list[Row] = []
    for size in bench.sizes:
        for rank in bench.ranks:
            for clients in bench.clients:
                rows += _rows(bench, size, rank, clients)
    return Figures(
        name="aggregation",
        title=f"Aggregation of one module, {bench.num_threads} thread(s)",
        machine=describe_machine(),
        settings={name: getattr(bench, name) for name in AggregationBench.__slots__},
        rows=rows,
    )


def _rows(bench: AggregationBench, size: int, rank: int, clients: int) -> list[Row]:
    prefix = f"{size} x {size}, rank {rank}, {clients} clients: "
    sent, updates = _updates(size, rank, clients)
    wanted = _dense(updates, rank)
    ways: dict[str, Callable[[], Factors]] = {DENSE: partial(_dense, updates, rank)}
    for name in bench.methods:
        ways[name] = partial(_by_method, make_aggregator(name), sent, updates)
    timed = in_turns(ways, bench.repeats, warm_up=1)
    return [
        Row(
            what=prefix + name,
            seconds=seconds,
            base=prefix + DENSE,
            beside={"off by": _distance(ways[name](), wanted)},
        )
        for name, seconds in timed.items()
    ]


def _updates(size: int, rank: int, clients: int) -> tuple[Factors, Sequence[Update]]:
    """Return what all clients were sent, whose B is 0, and what each returned."""
    generator = torch.Generator().manual_seed(size + rank + clients)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(size)

    sent = Factors(drawn(rank, size), torch.zeros(size, rank), _SCALE)
    return sent, [
        Update(slot, sent, Factors(drawn(rank, size), drawn(size, rank), _SCALE), weight=1.0 + slot)
        for slot in range(clients)
    ]


def _dense(updates: Sequence[Update], rank: int) -> Factors:
    """Return the best factors of the mean by the whole matrix, in fp32."""
    total = sum(update.weight for update in updates)
    mean = torch.zeros(updates[0].returned.out_features, updates[0].returned.in_features)
    for update in updates:
        factors = update.returned
        mean += (update.weight / total * factors.scale) * (factors.B @ factors.A)
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
    return Factors(vh[:rank], u[:, :rank] * s[:rank], 1.0)


def _by_method(aggregator: Aggregator, sent: Factors, updates: Sequence[Update]) -> Factors:
    """Return what a client of the same rank and scale gets."""
    state = aggregator.init(sent)
    state = aggregator.aggregate(state, updates).state
    return aggregator.distribute(state, sent.rank, sent.scale)


def _distance(one: Factors, other: Factors) -> float:
    """Return the Frobenius distance of two products as a share of the second's norm."""
    mine, theirs = (f.scale * (f.B.double() @ f.A.double()) for f in (one, other))
    return float((mine - theirs).norm() / theirs.norm())
