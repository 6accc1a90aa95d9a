"""How many clients the simulation that this process is an actor of runs at once."""

import os
import sys

_POOL_CAP = 32

SIMULATED = "simulated"
"""In a node config: the node is of a simulation on the ServerApp's own machine."""


def pool_cap() -> int:
    """Return how many clients this machine's simulation runs at once at most.

    Flower hands messages to its actors from a thread pool of Python's default size.
    """
    return min(_POOL_CAP, (os.cpu_count() or 1) + 4)


def simulated_clients_at_once() -> int:
    """Return the number of actors of this simulation; 0 outside a simulation.

    Only an actor can tell: its own share of CPUs and GPUs is not known to the ServerApp.
    """
    ray = sys.modules.get("ray")  # an actor has it loaded; nobody else needs it
    if ray is None or not ray.is_initialized():
        return 0
    assigned = ray.get_runtime_context().get_assigned_resources()
    cluster = ray.cluster_resources()
    limits = [
        int(float(cluster.get(name, 0.0)) / float(share) + 1e-9)
        for name, share in assigned.items()
        if name in ("CPU", "GPU") and float(share) > 0
    ]
    return min([*limits, pool_cap()]) if limits else 0
