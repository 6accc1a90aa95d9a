"""Print how far apart honest clients are: each one's norm over the median of its round's clients.

The clients of the quick start train its rounds with its model, data, optimizers and aggregation, in one
process over loopback gRPC. Printed are the norms of their gradients of the trunk in every window and of
the changes of their adapters in every round, as ``trunk.outlier-factor`` and ``strategy.outlier-factor``
compare them, and the hashes of both adapters with the bounds and without: equal where no bound was
reached. A round takes about five seconds on one core:

    python simulations/outlier_ratios.py --rounds 12 --seeds 0 1 2
"""

import argparse
import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from flower_split.aggregation.adapter_aggregator import AdapterUpdate
from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.aggregation.core.outliers import Outliers, multiples
from flower_split.aggregation.from_config import adapter_aggregator
from flower_split.cli.app_config import load_app_config
from flower_split.client.client import Client
from flower_split.client.model_cache import RunCache
from flower_split.config import RunConfig
from flower_split.lora import adapter_state, lora_scales
from flower_split.messages.orders import TrainOrder, TrunkOrder
from flower_split.protocol.values import RoundBase, RoundPlan
from flower_split.runtime.logs import quiet_libraries
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.trunk.build import make_engine
from flower_split.trunk.compute.gradients import SlotGradient, outliers, pulls_of
from flower_split.trunk.engine import settling
from flower_split.trunk.service.server import TrunkServer

logger = logging.getLogger(__name__)

QUICKSTART = Path(__file__).parent / "quickstart"
TOKEN = "of this process alone"


@dataclass(slots=True)
class Ratios:
    """Every client's norm over the median of its window, or of its round."""

    gradients: list[float] = field(default_factory=list)
    adapters: list[float] = field(default_factory=list)

    def window(self, gradients: Mapping[int, SlotGradient], factor: float) -> dict[int, str]:
        """Note a window of the trunk; stands in for :func:`outliers`, and answers as it does."""
        self.gradients += multiples(pulls_of(gradients)).values()
        return outliers(gradients, factor)

    def round(self, clients: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        """Note a round's adapters; a transform that changes nothing."""
        self.adapters += multiples(Outliers(1.0).distances(clients)).values()
        return clients


def train(config: RunConfig, ratios: Ratios) -> tuple[str, str]:
    """Train all rounds; return the hashes of the clients' adapter and of the trunk's."""
    clients = [
        Client(RunCache(config), slot, config.num_clients) for slot in range(config.num_clients)
    ]
    for client in clients:  # models and data are loaded one at a time: neither is made for threads
        logger.debug("%d examples, %s", len(client.data.train), type(client.model).__name__)
    aggregator = adapter_aggregator(config.strategy, lora_scales(clients[0].model))
    aggregator.init(adapter_state(clients[0].model))
    engine = make_engine(config)
    engine.keep_as_initial()
    server = TrunkServer(engine, coordinator_token=TOKEN)
    address = f"127.0.0.1:{server.start()}"
    coordinator = TrunkCoordinator(address, TOKEN, timeout=60.0)
    base: RoundBase | None = None
    factor = len(clients) ** 0.5 if config.scales_client_rate else 1.0
    kept: list[Mapping[str, Tensor] | None] = [{} if config.keeps_optimizer else None] * len(
        clients
    )
    try:
        for number in range(1, config.num_server_rounds + 1):
            tokens = {slot: f"token {slot} of {number}" for slot in range(len(clients))}
            coordinator.begin_round(
                RoundPlan(
                    experiment="ratios",
                    server_round=number,
                    attempt=0,
                    participants=tokens,
                    steps_per_round=config.train.local_steps,
                    num_server_rounds=config.num_server_rounds,
                    base=base,
                )
            )
            sent = aggregator.distribute()
            with ThreadPoolExecutor(len(clients)) as pool:
                orders = [
                    TrainOrder(
                        trunk=TrunkOrder(address=address, token=tokens[slot], server_round=number),
                        rate_factor=factor,
                    )
                    for slot in range(len(clients))
                ]
                results = list(
                    pool.map(Client.train, clients, repeat(sent), orders, repeat({}), kept)
                )
            if config.keeps_optimizer:
                kept = [result.optimizer_state for result in results]
            updates = [
                AdapterUpdate(c.partition_id, sent, adapter_state(c.model), float(r.num_tokens))
                for c, r in zip(clients, results, strict=True)
            ]
            aggregator.aggregate(updates, then=[ratios.round])
            report = coordinator.prepare_round("ratios", number, 0)
            coordinator.commit_round("ratios", number, 0)
            base = RoundBase(number, report.digest)
        return digest(aggregator.distribute()), digest(engine.adapter())
    finally:
        coordinator.close()
        server.stop(0.0)
        engine.close()


def digest(adapter: Mapping[str, Tensor]) -> str:
    """Return the beginning of an adapter's SHA-256."""
    sha = hashlib.sha256()
    for name, tensor in sorted(adapter.items()):
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()[:12]


def in_words(name: str, values: Sequence[float]) -> str:
    """Return the distribution of some ratios in a line."""
    shares = torch.tensor([0.0, 0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
    found = torch.quantile(torch.tensor(values, dtype=torch.float64), shares).tolist()
    labels = ("least", "median", "90 %", "99 %", "most")
    return f"{name} ({len(values)}): " + ", ".join(
        f"{label} {value:.3f}" for label, value in zip(labels, found, strict=True)
    )


def main() -> None:
    """Print the distributions, and the hashes of each seed."""
    parser = argparse.ArgumentParser(prog="python simulations/outlier_ratios.py")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--without", action="store_true", help="also train without the bounds")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    quiet_libraries()
    torch.set_num_threads(1)
    ratios = Ratios()
    for seed in arguments.seeds:
        config = load_app_config(QUICKSTART, [f"seed={seed} num-server-rounds={arguments.rounds}"])
        with mock.patch.object(settling, "outliers", ratios.window):
            print(
                f"seed {seed}: clients {{}}, trunk {{}}".format(*train(config, ratios)), flush=True
            )
        if arguments.without:
            free = replace(
                config,
                trunk=replace(config.trunk, outlier_factor=0.0),
                strategy=replace(config.strategy, outlier_factor=0.0),
            )
            hashes = train(free, Ratios())
            print(f"seed {seed}, no bounds: clients {{}}, trunk {{}}".format(*hashes), flush=True)
    print(in_words("gradients of the trunk over their window's median", ratios.gradients))
    print(in_words("adapters' changes over their round's median", ratios.adapters))


if __name__ == "__main__":
    main()
