"""Deployed clients with a worker and without: the same adapter, and what a round costs each."""

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flower_split.config import Scalar
from flower_split.runs.directory import RunDirectory
from tests.processes.test_deployment import Deployment, deployment
from tests.processes.test_runs import adapters_of, digest
from tests.support.flower_home import Flower, end, free_port, processes_of
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config

ROUNDS = 3
QUICKSTART_ROUNDS = 5  # the last two end with an evaluation
QUICKSTART = Path(__file__).parents[2] / "simulations" / "quickstart"
FLOWERS, OURS = ("flower-supernode",), ("flower-split", "supernode")
WORKER = "flower_split.client.worker.serve"
TICKS = os.sysconf("SC_CLK_TCK")

__all__ = ["deployment"]


@dataclass(frozen=True)
class Process:
    """What /proc says of a process; of one that has ended and was not waited for, too."""

    pid: int
    parent: int
    seconds: float  # of CPU, its own
    of_children: float  # that it has waited for
    command: str

    @classmethod
    def all(cls) -> list["Process"]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                after = (folder / "stat").read_text().rpartition(")")[2].split()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            own, children = (sum(map(int, after[at : at + 2])) / TICKS for at in (11, 13))
            found.append(cls(int(folder.name), int(after[1]), own, children, command))
        return found


def workers_of(home: Path) -> list[Process]:
    ours = set(processes_of(home))
    return [p for p in Process.all() if p.pid in ours and WORKER in p.command]


def client_seconds(home: Path, nodes: list[int]) -> float:
    """CPU seconds of all ClientApp processes of some SuperNodes so far, and of the workers."""
    processes = Process.all()
    starters = {p.pid: p for p in processes if p.parent in nodes}  # flower-superexec
    apps = [p for p in processes if p.parent in starters]
    waited_for = sum(p.of_children for p in starters.values())
    return (
        waited_for
        + sum(p.seconds + p.of_children for p in apps)
        + sum(p.seconds + p.of_children for p in workers_of(home) if p.parent not in starters)
    )


@dataclass
class Watch:
    """Notes the clients' CPU seconds as each round ends."""

    home: Path
    nodes: list[int]
    metrics: Path
    seconds: list[float] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Watch":
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self.done.wait(0.2):
            if len(rounds_of(self.metrics)) > len(self.seconds):
                self.seconds.append(client_seconds(self.home, self.nodes))

    def per_round(self) -> list[float]:
        """CPU seconds of a client from each round's end to the next one's, from round 2."""
        number = len(self.nodes)
        return [(b - a) / number for a, b in zip(self.seconds, self.seconds[1:], strict=False)]

    def beside_training(self) -> list[float]:
        """The same, less what the clients' steps computed (one thread: wall is CPU, if not busy)."""
        trained = [
            sum(line["compute_seconds"] for line in lines_of(self.metrics, "step", server_round))
            for server_round in range(2, len(self.seconds) + 1)
        ]
        both = zip(self.per_round(), trained, strict=True)
        return [all_of_it - steps / len(self.nodes) for all_of_it, steps in both]


def lines_of(metrics: Path, kind: str, server_round: int = 0) -> list[dict[str, float]]:
    """The lines of a kind so far; of a round, or of all."""
    if not metrics.exists():
        return []
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    return [
        line for line in lines if line["kind"] == kind and server_round in (0, line["server_round"])
    ]


def rounds_of(metrics: Path) -> list[float]:
    """Seconds of each round that has ended, from round 1."""
    return [line["seconds"] for line in lines_of(metrics, "round") if line["server_round"]]


def make_large_model(path: Path) -> Path:
    """A Llama of 528 MB with the tiny model's tokenizer."""
    make_model(path)
    config = LlamaConfig.from_pretrained(path)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 768, 3072, 14
    config.num_attention_heads = config.num_key_value_heads = 12
    config.head_dim = 64
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def deploy(
    deployment: Deployment,  # noqa: F811
    supernode: tuple[str, ...] = OURS,
    number: int = 2,
) -> list[int]:
    """A SuperLink and its SuperNodes; returns the SuperNodes' process ids."""
    port = free_port()
    (deployment.home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    deployment.start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
    for partition in range(number):
        deployment.start(
            *supernode,
            *("--insecure", "--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1"),
            *("--port", str(free_port())),
            *("--node-config", f"partition-id={partition} num-partitions={number}"),
        )
    return [node.pid for node in deployment.services[1:]]


def config_of(root: Path, model: Path, **changes: Scalar) -> Mapping[str, Scalar]:
    """A quick run without evaluation, so that a round is one message to each client."""
    fixed: dict[str, Scalar] = {
        "num_server_rounds": ROUNDS,
        "fraction_evaluate": 0.0,
        "train__local_steps": 2,
    }
    return tiny_config(model, make_data(root / "data", 2), **{**fixed, **changes})


def run(
    deployment: Deployment,  # noqa: F811
    nodes: list[int],
    root: Path,
    name: str,
    config: Mapping[str, Scalar],
) -> tuple[str, Watch]:
    """Run a job to its end; returns the digest of its adapters, and what was measured."""
    app = make_app(root / f"app-{name}", {**config, "run-dir": str(root / name)})
    with Watch(deployment.home, nodes, root / name / "metrics.jsonl") as watch:
        done = Flower(deployment.home, deployment.env).command(
            *("flower-split", "run", str(app), "loopback", "--stream"), timeout=1200
        )
    assert done.returncode == 0, done.stdout + deployment.tails()
    figures = {
        "seconds of a round": rounds_of(watch.metrics),
        "CPU seconds of a client and round, from round 2": watch.per_round(),
        "of these, beside its training": watch.beside_training(),
    }
    for what, numbers in figures.items():
        print(f"{name}: {what}: {', '.join(f'{number:.1f}' for number in numbers)}")
    return digest(adapters_of(RunDirectory.open(root / name))), watch


@pytest.mark.timeout(2400)
@pytest.mark.slow  # a process for every message: five minutes on two idle cores
def test_worker_changes_no_bit_costs_less_and_ends_with_its_node(
    deployment: Deployment,  # noqa: F811
    tmp_path: Path,
) -> None:
    nodes, config = deploy(deployment), config_of(tmp_path, make_model(tmp_path / "model"))
    off = {**config, "train.client-worker": "off"}
    cold, without = run(deployment, nodes, tmp_path, "cold", off)
    assert workers_of(deployment.home) == []
    warm, measured = run(deployment, nodes, tmp_path, "warm", config)
    assert len(workers_of(deployment.home)) == 2, deployment.tails()
    assert warm == cold
    assert min(measured.per_round()) < min(without.per_round()) / 2

    end([nodes[0]])
    deadline = time.monotonic() + 20
    while len(workers_of(deployment.home)) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers_of(deployment.home)) == 1
    assert "not answered by the node's worker" not in deployment.tails()


@pytest.mark.timeout(2400)
@pytest.mark.slow  # as above
def test_workers_killed_after_a_rounds_training_cost_no_round_and_no_bit(
    deployment: Deployment,  # noqa: F811
    tmp_path: Path,
) -> None:
    deployment.env["FLOWER_SPLIT_FAILPOINTS"] = "client.train.end=kill@2"
    nodes, model = deploy(deployment), make_model(tmp_path / "model")
    config = config_of(tmp_path, model, num_server_rounds=3)
    killed, _ = run(deployment, nodes, tmp_path, "killed", config)
    logs = "".join(log.read_text() for log in deployment.logs)
    assert logs.count("not answered by the node's worker") >= 2, deployment.tails()
    off = {**config, "train.client-worker": "off"}
    calm, _ = run(deployment, nodes, tmp_path, "calm", off)
    assert killed == calm


@pytest.mark.timeout(2400)
@pytest.mark.slow  # as above
def test_second_round_with_a_large_checkpoint_costs_a_client_little_but_its_training(
    deployment: Deployment,  # noqa: F811
    tmp_path: Path,
) -> None:
    nodes, model = deploy(deployment), make_large_model(tmp_path / "model")
    assert (model / "model.safetensors").stat().st_size > 500e6
    config = config_of(tmp_path, model, model__second_cut=12)
    _, measured = run(deployment, nodes, tmp_path, "large", config)
    assert measured.beside_training()[0] <= 3.0


def quick_start(
    deployment: Deployment,  # noqa: F811
    directory: Path,
    superlink: str = "",
) -> list[float]:
    """Run the quick-start's first rounds; returns their seconds."""
    config = {
        "num-server-rounds": QUICKSTART_ROUNDS,
        "local-only-baseline": False,
        "report": "",
        "run-dir": str(directory),
    }
    words = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    named = [superlink] if superlink else []
    done = Flower(deployment.home, deployment.env).command(
        *("flower-split", "run", str(QUICKSTART), *named, "--stream", "--run-config", words),
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + deployment.tails()
    return rounds_of(directory / "metrics.jsonl")


@pytest.mark.timeout(2400)
@pytest.mark.slow  # two runs of five rounds; two to four minutes on two idle cores
def test_deployed_rounds_after_the_first_take_little_longer_than_simulated_ones(
    deployment: Deployment,  # noqa: F811
    tmp_path: Path,
) -> None:
    simulated = quick_start(deployment, tmp_path / "simulated")
    deploy(deployment, number=4)
    deployed = quick_start(deployment, tmp_path / "deployed", "loopback")
    ratio = sum(deployed[1:]) / sum(simulated[1:])
    for name, seconds in (("simulated", simulated), ("deployed", deployed)):
        print(f"{name}: seconds of a round: {', '.join(f'{number:.1f}' for number in seconds)}")
    print(f"deployed rounds take {ratio:.2f} of the simulated ones' time, from round 2")
    assert digest(adapters_of(RunDirectory.open(tmp_path / "deployed"))) == digest(
        adapters_of(RunDirectory.open(tmp_path / "simulated"))
    )
    assert ratio <= 1.5
