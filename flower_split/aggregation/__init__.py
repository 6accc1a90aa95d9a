"""LoRA aggregation: every method of the field behind one interface, in plain torch.

::

    aggregator = make_aggregator("product-delta", max_rank=16)
    state = aggregator.init(Factors(A, B, scale))            # one module's initial factors
    sent = aggregator.distribute(state, rank=8, scale=2.0)   # for a client of that rank and scale
    result = aggregator.aggregate(state, [Update("a", sent, returned, weight=12), ...])
    aggregator.delta(result.state)                           # the new global ΔW as factors

Runs in the ServerApp. Begin with ``core/method`` (the interface) and ``methods/product_delta`` (the
default). ``methods`` has one module per paper, ``registry`` their names and ``description`` what each
does otherwise than its paper; ``core/lowrank`` has the linear algebra, ``core/checks`` the refusals.
``adapter_aggregator`` aggregates whole adapters, which is what the strategy uses (``aggregator_state``
is its checkpoint, ``from_config`` makes it); ``rules`` are what may come before any method.
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
