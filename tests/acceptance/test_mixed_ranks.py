"""Clients of LoRA ranks 2, 4 and 8 through the whole ServerApp, against dense fp64 references."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from torch import Tensor

import flower_split.client.client
from flower_split.config import Scalar, parse_run_config
from flower_split.errors import AggregationError
from flower_split.lora import adapter_state, load_adapter_state
from flower_split.messages.arrays import from_arrays
from flower_split.runs.directory import RunDirectory
from flower_split.runs.manifest import FOLDER, RunCheckpoints
from flower_split.server.app import run
from flower_split.training.measures import TrainResult
from flower_split.training.round import train_round
from tests.support.flower_home import Flower
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config

ALPHA, FULL = 16.0, 8
RANKS = {0: 2, 1: 4, 2: 8}
NODES = {0: {"lora-rank": 2}, 1: {"memory": 11}, 2: {"memory": 64.0}}
Adapter = dict[str, Tensor]
Dense = dict[str, Tensor]


@dataclass
class Turn:
    """What one client was sent and sent back in one training round."""

    slot: int
    received: Adapter
    returned: Adapter
    weight: float


class Watched(LocalGrid):
    """The grid, with everything that travelled for training."""

    def __init__(
        self, num_clients: int, config: Mapping[str, Scalar], nodes: Mapping[int, object]
    ) -> None:
        super().__init__(num_clients, config)
        self.turns: list[Turn] = []
        for slot, own in nodes.items():
            self.contexts[100 + slot].node_config.update(own)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = dict(self._waiting)
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            message = waiting[reply.metadata.reply_to_message_id]
            if message.metadata.message_type == "train" and not reply.has_error():
                (metrics,) = reply.content.metric_records.values()
                self.turns.append(
                    Turn(
                        message.metadata.dst_node_id - 100,
                        from_arrays(message.content.array_records["arrays"]),
                        from_arrays(reply.content.array_records["arrays"]),
                        float(str(metrics["num-tokens"])),
                    )
                )
        return replies


@dataclass
class Job:
    """Runs tiny jobs in this process."""

    root: Path
    model: Path
    data: str
    nodes: Mapping[int, object] = field(default_factory=lambda: NODES)

    def config(self, aggregator: str, **changes: Scalar) -> dict[str, Scalar]:
        """Three clients, two rounds of two steps; ``changes`` as of :func:`tiny_config`."""
        config = tiny_config(self.model, self.data, **changes)
        config |= {
            "run-dir": str(self.root / "run"),
            "num-clients": 3,
            "num-server-rounds": 2,
            "train.local-steps": 2,
            "trunk.step-every": "server-round",
            "strategy.aggregator": aggregator,
            "lora.rank-by-memory": "8=2, 12=4",
        }
        for part in ("bottom", "top"):
            config |= {f"lora.{part}.r": FULL, f"lora.{part}.alpha": ALPHA}
        config |= {name.replace("__", ".").replace("_", "-"): v for name, v in changes.items()}
        return config

    def run(self, aggregator: str, **changes: Scalar) -> tuple[RunDirectory, list[list[Turn]]]:
        """The finished run, and its turns by round, in order of slots."""
        config = self.config(aggregator, **changes)
        grid = Watched(3, config, self.nodes)
        run(grid, parse_run_config(config))
        rounds = [grid.turns[i : i + 3] for i in range(0, len(grid.turns), 3)]
        ordered = [sorted(turns, key=lambda turn: turn.slot) for turns in rounds]
        return RunDirectory.open(self.root / "run"), ordered


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("parts")
    return make_model(root / "model"), make_data(root / "data", 3)


@pytest.fixture
def job(tmp_path: Path, parts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    return Job(tmp_path, *parts)


def modules_of(adapter: Adapter) -> list[str]:
    return [n.removesuffix(".lora_A.weight") for n in adapter if n.endswith(".lora_A.weight")]


def factors(adapter: Adapter, module: str) -> tuple[Tensor, Tensor]:
    a, b = adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"]
    return a.double(), b.double()


def dense(adapter: Adapter, module: str, alpha: float = ALPHA) -> Tensor:
    """ΔW = alpha / r · B @ A in fp64: what PEFT adds for r, alpha of the factors' own rank."""
    a, b = factors(adapter, module)
    return alpha / a.shape[0] * b @ a


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def mean_change(turns: list[Turn], module: str, total: Tensor) -> Tensor:
    """product-delta: the global ΔW and the mean of what the clients changed."""
    weights = sum(turn.weight for turn in turns)
    for turn in turns:
        change = dense(turn.returned, module) - dense(turn.received, module)
        total = total + turn.weight / weights * change
    return total


def mean(turns: list[Turn], module: str, total: Tensor) -> Tensor:
    """flexlora, and florist at tau = 1: the mean of the clients' ΔW."""
    weights = sum(turn.weight for turn in turns)
    found: Tensor = sum(t.weight / weights * dense(t.returned, module) for t in turns)  # type: ignore[assignment]
    return found


def padded_mean(turns: list[Turn], module: str, total: Tensor) -> Tensor:
    """hetlora: zero-padded factors, weighted by ‖ΔW‖, at the full rank's scale."""
    norms = [float(dense(turn.returned, module).norm()) for turn in turns]
    mean_a, mean_b = 0, 0
    for turn, norm in zip(turns, norms, strict=True):
        a, b = factors(turn.returned, module)
        missing, share = FULL - a.shape[0], norm / sum(norms)
        scaled = b * (ALPHA / a.shape[0]) / (ALPHA / FULL)
        mean_a = mean_a + share * torch.nn.functional.pad(a, (0, 0, 0, missing))
        mean_b = mean_b + share * torch.nn.functional.pad(scaled, (0, missing))
    return ALPHA / FULL * mean_b @ mean_a  # type: ignore[operator,no-any-return]


def componentwise(turns: list[Turn], module: str, total: Tensor) -> Tensor:
    """raflora: component p averaged over the clients of rank above p."""
    found = torch.zeros_like(total)
    for p in range(FULL):
        held = [turn for turn in turns if RANKS[turn.slot] > p]
        weights = sum(turn.weight for turn in held)
        for turn in held:
            a, b = factors(turn.returned, module)
            found += turn.weight / weights * ALPHA / a.shape[0] * torch.outer(b[:, p], a[p])
    return found


REFERENCES: dict[str, Callable[[list[Turn], str, Tensor], Tensor]] = {
    "product-delta": mean_change,
    "flexlora": mean,
    "florist": mean,
    "hetlora": padded_mean,
    "raflora": componentwise,
}


def expected(aggregator: str, rounds: list[list[Turn]], module: str) -> Tensor:
    a, b = factors(rounds[0][2].received, module)
    total = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
    for turns in rounds:
        total = REFERENCES[aggregator](turns, module, total)
    return total


@pytest.mark.parametrize(
    "aggregator",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "florist" else [])
        for name in sorted(REFERENCES)
    ],
)
def test_run_with_mixed_ranks_ends_on_the_dense_reference(job: Job, aggregator: str) -> None:
    # The reference never prunes a rank; what pruning does is tested beside the method.
    options = {"strategy__options": "gamma=1"} if aggregator == "hetlora" else {}
    done, rounds = job.run(aggregator, **options)
    final = done.read_adapter("client")
    assert [len(turns) for turns in rounds] == [3, 3]
    for turns in rounds:
        for turn in turns:
            assert turn.received.keys() == turn.returned.keys() == final.keys()
            for module in modules_of(final):
                assert factors(turn.received, module)[0].shape[0] == RANKS[turn.slot]
                assert factors(turn.returned, module)[1].shape[1] == RANKS[turn.slot]
    for module in modules_of(final):
        assert factors(final, module)[0].shape[0] == FULL
        goal = best_of_rank(expected(aggregator, rounds, module), FULL)
        error = float((dense(final, module) - goal).norm() / goal.norm())
        assert goal.norm() > 1e-3 and error < 1e-5, module
    assert len(done.metrics("evaluation")) == 9


def test_client_of_small_rank_receives_the_leading_part_of_the_global_change(job: Job) -> None:
    _, rounds = job.run("product-delta")
    for module in modules_of(rounds[0][0].received):
        total = expected("product-delta", rounds[:1], module)
        for turn in rounds[1]:
            goal = best_of_rank(total, RANKS[turn.slot])
            error = float((dense(turn.received, module) - goal).norm() / total.norm())
            assert error < 1e-5, module


def test_flora_with_mixed_ranks_puts_the_exact_mean_into_the_base(job: Job) -> None:
    done, rounds = job.run("flora")
    base, final = done.read_adapter("base"), done.read_adapter("client")
    for module in modules_of(final):
        goal: Tensor = sum(mean(turns, module, torch.zeros(1)) for turns in rounds)  # type: ignore[assignment]
        a, b = base[f"{module}.base_A"].double(), base[f"{module}.base_B"].double()
        assert float((b @ a - goal).norm() / goal.norm()) < 1e-5
        assert not dense(final, module).any()


def idle_from_round_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """From round 2 on, clients work with the trunk as always and return what they received."""

    def idle(model, batches, config, place, trunk, **rest) -> TrainResult:  # type: ignore[no-untyped-def]
        before = adapter_state(model)
        result = train_round(model, batches, config, place, trunk, **rest)
        if place.server_round > 1:
            load_adapter_state(model, before)
        return result

    monkeypatch.setattr(flower_split.client.client, "train_round", idle)


@pytest.mark.parametrize(
    ("aggregator", "changes"), [("product-delta", False), ("raflora", False), ("flexlora", True)]
)
def test_round_without_training_changes_nothing_but_with_flexlora(
    job: Job, monkeypatch: pytest.MonkeyPatch, aggregator: str, changes: bool
) -> None:
    idle_from_round_two(monkeypatch)
    done, rounds = job.run(aggregator)
    assert all(
        torch.equal(turn.received[name], turn.returned[name])
        for turn in rounds[1]
        for name in turn.received
    )
    checkpoints = RunCheckpoints(done.path / FOLDER)
    before, after = checkpoints.latest(previous=True), checkpoints.latest()
    assert before is not None and after is not None
    assert (before.entry.server_round, after.entry.server_round) == (1, 2)
    errors = [
        float(
            (dense(after.adapter, module) - dense(before.adapter, module)).norm()
            / dense(before.adapter, module).norm()
        )
        for module in modules_of(after.adapter)
    ]
    if changes:
        assert max(errors) > 1e-2
    else:
        assert max(errors) < 1e-6
    if aggregator == "product-delta":
        assert all(torch.equal(before.adapter[n], after.adapter[n]) for n in after.adapter)


@pytest.mark.parametrize("aggregator", ["fedit", "ffa-lora", "lora-fair"])
def test_method_of_one_rank_names_nodes_and_ranks(job: Job, aggregator: str) -> None:
    with pytest.raises(AggregationError) as caught:
        job.run(aggregator)
    text = str(caught.value)
    assert f'"{aggregator}" needs one rank' in text and "\n" not in text
    assert "rank 2 of partition 0 (node 100); rank 4 of partition 1 (node 101)" in text
    assert "product-delta" in text and "node 102" not in text


@pytest.mark.slow
def test_simulation_of_mixed_ranks_ends_on_the_bits_of_this_process(
    job: Job, flower: Flower
) -> None:
    changes: dict[str, Scalar] = {
        "lora__rank_by_memory": "",
        "lora__rank_by_partition": "0=2, 1=4",
        "strategy__server_optimizer": "momentum",
        "local_only_baseline": True,
    }
    config = job.config("product-delta", **changes)
    here = {**config, "run-dir": str(job.root / "here")}
    run(Watched(3, here, {}), parse_run_config(here))
    done = flower.command("flower-split", "run", str(make_app(job.root / "app", config)))
    assert done.returncode == 0, done.stdout
    one, two = (RunDirectory.open(job.root / name) for name in ("here", "run"))
    for part in ("client", "trunk"):
        first, second = one.read_adapter(part), two.read_adapter(part)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert one.summary()["clients"] == two.summary()["clients"]


def test_own_ranks_and_own_cut_layers_go_together(job: Job) -> None:
    """Client 0 (rank 2) and client 2 (rank 8) hold layer 1 beside the trunk, client 1 does not."""
    changes: dict[str, Scalar] = {
        "model__cuts_by_partition": "0=2:3, 2=2:3",
        "lora__trunk__r": FULL,
        "num_server_rounds": 1,
    }
    done, (turns,) = job.run("product-delta", **changes)
    final, overlap = done.read_adapter("client"), 0
    for module in modules_of(final):
        holders = [t for t in turns if f"{module}.lora_A.weight" in t.received]
        middle = ".layers.1." in module
        overlap += middle
        assert [t.slot for t in holders] == ([0, 2] if middle else [0, 1, 2])
        for turn in holders:
            assert factors(turn.returned, module)[0].shape[0] == RANKS[turn.slot]
        goal = best_of_rank(mean_change(holders, module, torch.zeros(())), FULL)
        assert float((dense(final, module) - goal).norm() / goal.norm()) < 1e-5, module
    assert overlap == 7
