"""Several experiments on one trunk, each with a coordinator and clients of its own."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import LoraConfigs, LoraPartConfig, OptimizerConfig, RunConfig
from flower_split.lora import adapter_state, attach_lora, load_adapter_state
from flower_split.parties.experiment_settings import brought
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import held_parts, model_cuts
from flower_split.protocol.values import RoundBase, RoundPlan
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.split import load_client_model, set_trunk
from flower_split.split.loading.model_source import ModelSource
from flower_split.training.measures import RoundPosition
from flower_split.training.round import train_round
from flower_split.trunk.build import ExperimentEngines
from flower_split.trunk.engine.several_experiments import SeveralExperiments
from flower_split.trunk.service.server import TrunkServer
from tests.acceptance.federation import make_batch

TOKEN = "the coordinator token of these tests"
ADAM = OptimizerConfig(name="adamw", learning_rate=0.02, max_grad_norm=1.0, weight_decay=0.01)
SLOTS = (0, 1)


def varied(config: RunConfig, number: int) -> RunConfig:
    """Another experiment over the same base: rank, targets, alpha, kind, optimizer, seed, clipping."""
    trunks = (
        LoraPartConfig(r=3, alpha=6.0),
        LoraPartConfig(r=8, alpha=4.0, target_modules="q_proj,v_proj"),
        LoraPartConfig(r=2, alpha=2.0, use_rslora=True, modules_to_save="input_layernorm"),
        LoraPartConfig(r=4, alpha=8.0, target_modules="down_proj", use_dora=True),
    )
    optimizer = ADAM if number % 2 else config.trunk.optimizer
    return replace(
        config,
        seed=number,
        lora=LoraConfigs(bottom=config.lora.bottom, trunk=trunks[number % 4], top=config.lora.top),
        trunk=replace(
            config.trunk, optimizer=optimizer, max_client_grad_norm=0.5 * (number % 3 == 2)
        ),
    )


@dataclass
class Several:
    """A served trunk of several experiments."""

    experiments: SeveralExperiments
    engines: ExperimentEngines
    port: int

    def coordinator(self, config: RunConfig | None = None, token: str = TOKEN) -> TrunkCoordinator:
        """A coordinator that brings the settings of ``config``."""
        made = TrunkCoordinator(f"127.0.0.1:{self.port}", token, timeout=30.0)
        if config is not None:
            made.bring(brought(config))
        return made


@contextmanager
def several(
    config: RunConfig,
    checkpoints: Path,
    *,
    maximum: int = 8,
    lease_seconds: float = 600.0,
    **options: object,
) -> Iterator[Several]:
    """A trunk that serves up to ``maximum`` experiments over the base of ``config``."""
    threads = torch.get_num_threads()
    engines = ExperimentEngines(config, checkpoints)
    experiments = SeveralExperiments(
        engines.make, engines.fingerprint, maximum=maximum, lease_seconds=lease_seconds
    )
    server = TrunkServer(experiments, coordinator_token=TOKEN, **options)
    try:
        yield Several(experiments, engines, server.start())
    finally:
        server.stop(0.0)
        experiments.close()
        torch.set_num_threads(threads)


def make_plan(name: str, server_round: int, **changes: object) -> RoundPlan:
    """A round of two clients, whose tokens are of this experiment and round."""
    plan = RoundPlan(
        experiment=name,
        server_round=server_round,
        attempt=0,
        participants={slot: f"{name}-{server_round}-{slot}" for slot in SLOTS},
        num_server_rounds=2,
        steps_per_round=2,
        join_seconds=30.0,
        window_seconds=30.0,
    )
    return replace(plan, **changes)


class Job:
    """One experiment's ServerApp and clients, by the product's own spine over real gRPC."""

    def __init__(self, name: str, config: RunConfig, port: int, *, brings: bool = True) -> None:
        self.name, self.config, self.port = name, config, port
        self._brings = brings
        self._models = {}
        for slot in SLOTS:
            model = load_client_model(
                ModelSource.of(config.model), model_cuts(config), torch.nn.Identity()
            )
            parts = held_parts(config, model_cuts(config))
            attach_lora(model, model_cuts(config), parts, seed=config.seed)
            self._models[slot] = model
        self._adapter = adapter_state(self._models[0])
        self.digests: list[str] = []

    def run(self, rounds: Sequence[int] = (1, 2)) -> str:
        """Train rounds; return the digest of the trunk's and the clients' weights after the last."""
        link = TrunkCoordinator(f"127.0.0.1:{self.port}", TOKEN, timeout=30.0)
        if self._brings:
            link.bring(brought(self.config))
        with closing(link) as coordinator, ThreadPoolExecutor(len(SLOTS)) as pool:
            for server_round in rounds:
                base = RoundBase(server_round - 1, self.digests[-1] if self.digests else "")
                coordinator.begin_round(make_plan(self.name, server_round, base=base))
                states = list(pool.map(lambda slot: self._train(slot, server_round), SLOTS))  # noqa: B023
                report = coordinator.prepare_round(self.name, server_round, 0)
                coordinator.commit_round(self.name, server_round, 0)
                self.digests.append(report.digest)
                self._adapter = {
                    name: (states[0][name] + states[1][name]) / 2 for name in states[0]
                }
            return f"{self.digests[-1]} {_sum(self._adapter)}"

    def _train(self, slot: int, server_round: int) -> dict[str, torch.Tensor]:
        model = self._models[slot]
        load_adapter_state(model, self._adapter)
        trunk = RemoteTrunk(
            f"127.0.0.1:{self.port}",
            token=f"{self.name}-{server_round}-{slot}",
            fingerprint=fingerprint(self.config),
            mode=self.config.mode,
            call_timeout=30.0,
        )
        set_trunk(model, trunk)
        batches = [make_batch(2, (5, 7), 100 * server_round + 10 * slot + step) for step in (0, 1)]
        position = RoundPosition(
            server_round=server_round, num_server_rounds=2, num_steps=2, partition_id=slot
        )
        try:
            trunk.open(2)
            train_round(model, iter(batches), self.config, position, trunk)
        finally:
            trunk.close()
        return adapter_state(model)


def run_all(jobs: Sequence[Job]) -> dict[str, str]:
    """Run jobs at once, all beginning together; by name, their digests."""
    barrier = threading.Barrier(len(jobs))

    def one(job: Job) -> str:
        barrier.wait(30)
        return job.run()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(zip([job.name for job in jobs], pool.map(one, jobs), strict=True))


def _sum(state: Mapping[str, torch.Tensor]) -> str:
    return str(sum(float(value.double().sum()) for _, value in sorted(state.items())))
