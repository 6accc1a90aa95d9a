"""The benchmark of aggregation: what the methods give is beside what the dense way gives."""

from flower_split.bench.aggregation import AggregationBench, measure_aggregation


def test_exact_methods_give_the_dense_matrix_and_means_of_factors_do_not() -> None:
    bench = AggregationBench(sizes=(24, 40), ranks=(2,), clients=(3,), repeats=2)
    figures = measure_aggregation(bench)
    ways = ["dense SVD", "product-delta", "flexlora", "fedit"]
    assert [row.what for row in figures.rows] == [
        f"{size} x {size}, rank 2, 3 clients: {way}" for size in (24, 40) for way in ways
    ]
    for row in figures.rows:
        assert len(row.seconds) == 2 and row.base.endswith("dense SVD")
        assert row.base.partition(":")[0] == row.what.partition(":")[0]
        off = row.beside["off by"]
        assert off > 0.1 if row.what.endswith("fedit") else off < 1e-5
