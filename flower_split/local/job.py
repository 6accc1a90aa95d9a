"""A local run: node processes and a trunk, then the app's own ServerApp in this process, over a grid.

The same ServerApp and ClientApp as under ``flwr run``, and the same bits on a CPU. What is left out is
Flower's SuperLink, Ray and the bundle that an app is packed into, which cost a quick run minutes.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp
from flwr.supercore.object_ref import load_app

from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.errors import ConfigError
from flower_split.local.grid import LocalGrid
from flower_split.local.nodes import RUN_ID, ClientAppRef, NodeProcesses, identify
from flower_split.local.trunk import ForkedTrunk
from flower_split.runtime.loading import loading_modules
from flower_split.server.federation.handshake import needs_all_at_once, num_participants

LOADED_BEFORE = (
    "flower_split.server.app",
    "flower_split.client.handlers",
    "flower_split.trunk.build",
    "flower_split.trunk.service.server",
    "peft.tuners.lora",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalJob:
    """What to run."""

    folder: Path  # of the app, for modules of its own
    server_app: str  # module:attribute
    client_app: str  # module:attribute
    run_config: Mapping[str, Scalar]  # flat and whole; paths are absolute


def load_modules() -> None:
    """Load what every process of a run needs, once, before they are forked."""
    with loading_modules():
        for name in LOADED_BEFORE:
            importlib.import_module(name)


def processes_of(config: RunConfig) -> int:
    """Return how many clients of a run must, or may usefully, work at a time."""
    if config.strategy.name == "fedbuff":
        return config.strategy.concurrency or config.num_clients
    if needs_all_at_once(config):
        return num_participants(config.num_clients, config.fraction_train)
    return min(config.num_clients, os.cpu_count() or 1)


def run_job(job: LocalJob, *, before: Callable[[], None] = lambda: None) -> None:
    """Run a job to its end. Call it in a process without threads that has not used torch.

    Args:
        job: What to run.
        before: Called once the node processes are forked, and before the ServerApp is.

    Raises:
        FlowerSplitError: The job cannot run, or failed.
    """
    config = parse_run_config(job.run_config)
    client_app = ClientAppRef(job.client_app, job.folder)
    with contextlib.ExitStack() as stack:
        nodes = NodeProcesses.fork(processes_of(config), client_app)
        stack.enter_context(nodes)
        trunk = None
        # One of several processes starts its own, which a child of multiprocessing's may not.
        if not config.trunk.address and config.trunk.processes == 1:
            trunk = ForkedTrunk.fork(nodes.processes)
            stack.enter_context(trunk)
        identify(0)
        before()
        server_app = load_app(job.server_app, ConfigError, job.folder)
        if not isinstance(server_app, ServerApp):
            raise ConfigError(
                f"the component serverapp must name a Flower ServerApp; {job.server_app} is "
                f"{type(server_app).__name__}. Correct the app's pyproject.toml."
            )
        grid = LocalGrid(nodes, config.num_clients, job.run_config)
        grid.trunk = trunk
        grid.prepare()
        server_app(grid, Context(RUN_ID, 0, {}, RecordDict(), dict(job.run_config)))
