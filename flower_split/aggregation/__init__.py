"""LoRA aggregation: every method of the field behind one interface, in plain torch.

::

    aggregator = make_aggregator("product-delta", max_rank=16)
    state = aggregator.init(Factors(A, B, scale))            # one module's initial factors
    sent = aggregator.distribute(state, rank=8, scale=2.0)   # for a client of that rank and scale
    result = aggregator.aggregate(state, [Update("a", sent, returned, weight=12), ...])
    aggregator.delta(result.state)                           # the new global ΔW as factors

One module per method, named after its paper; ``lowrank`` has the linear algebra, ``checks`` the
refusals. ``modules`` aggregates whole adapters, which is what the strategy uses; ``robust`` names
the rules that may come before any method.
"""

from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.methods.registry import AGGREGATORS, METHODS, make_aggregator

__all__ = [
    "AGGREGATORS",
    "METHODS",
    "AggregationResult",
    "Aggregator",
    "Factors",
    "State",
    "Update",
    "make_aggregator",
]
