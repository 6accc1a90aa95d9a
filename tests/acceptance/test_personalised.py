"""Each client's own model, before averaging, beside the global one: numbers of the unsplit model."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from flower_split.client.client import Client
from flower_split.client.model_cache import RunCache
from flower_split.config import Scalar, parse_run_config
from flower_split.lora import load_adapter_state
from flower_split.messages.arrays import from_arrays
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from tests.acceptance.test_tasks import trunk_in_this_process  # noqa: F401  (a fixture)
from tests.support.local_grid import LocalGrid
from tests.support.tiny_app import make_data, make_model, tiny_config
from tests.unit.experiments.test_baselines import loss_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, on models this small
CLIENTS = 2


class Overhearing(LocalGrid):
    """Keeps the adapter of every training reply, as it was before it was averaged."""

    def __init__(self, config: Mapping[str, Scalar]) -> None:
        super().__init__(CLIENTS, config)
        self.trained: dict[int, dict[str, Tensor]] = {}  # partition -> of its last training

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if reply.metadata.message_type == "train" and reply.has_content():
                [record] = reply.content.array_records.values()
                self.trained[reply.metadata.src_node_id - 100] = from_arrays(record)
        return replies


def config_of(tmp_path: Path, **changes: Scalar) -> dict[str, Scalar]:
    model, data = tmp_path / "model", tmp_path / "data"
    if not model.exists():
        make_model(model), make_data(data, CLIENTS)
    return tiny_config(
        model,
        str(data / "{partition_id}.jsonl"),
        num_server_rounds=2,
        trunk__step_every="server-round",
        train__local_steps=3,
        evaluation__personalised=True,
        run_dir=str(tmp_path / "run"),
        **changes,
    )


def loss_under(model: torch.nn.Module, adapter: Mapping[str, Tensor], client: Client) -> float:
    """The unsplit model's loss on a client's held-out data, written out."""
    load_adapter_state(model, adapter)
    with torch.no_grad():
        return float(loss_of(model.eval(), list(client.eval_batches())))


def test_own_models_have_the_unsplit_models_loss_before_averaging(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    parsed = parse_run_config(config)
    grid = Overhearing(config)
    run(grid, parsed)
    done = RunDirectory.open(tmp_path / "run")
    lines = {
        (line["server_round"], line["partition_id"]): line for line in done.metrics("evaluation")
    }
    shared, trunk = done.read_adapter("client"), done.read_adapter("trunk")
    sums = [0.0, 0.0]
    for slot in range(CLIENTS):
        client = Client(RunCache(parsed), slot, CLIENTS)
        model, _ = client.kept.whole_model(client.own)
        assert any(not torch.equal(grid.trained[slot][name], shared[name]) for name in shared)
        losses = [
            loss_under(model, {**adapter, **trunk}, client)
            for adapter in (grid.trained[slot], shared)
        ]
        line = lines[2, slot]
        own = line["personal_sums"]["loss-sum"]  # type: ignore[index, call-overload]
        assert own / line["num_tokens"] == pytest.approx(losses[0], rel=2e-5)
        assert line["eval_loss"] == pytest.approx(losses[1], rel=2e-5)
        assert line["personal_perplexity"] == pytest.approx(
            float(torch.tensor(losses[0]).exp()), rel=1e-4
        )
        assert abs(losses[0] - losses[1]) > 1e-4
        sums[0] += own
        sums[1] += float(line["num_tokens"])  # type: ignore[arg-type]
        before = lines[0, slot]  # nobody has trained: the global model is everybody's own
        assert before["personal_perplexity"] == before["perplexity"]
    together = float(torch.tensor(sums[0] / sums[1]).exp())
    assert done.metrics("round")[-1]["personal_perplexity"] == pytest.approx(together, rel=1e-5)
    overall = done.summary()["overall"]
    assert overall["personalised"] == pytest.approx(together, rel=1e-5)  # type: ignore[index, call-overload]
    assert "| personalised |" in (done.path / "report.md").read_text()


def test_a_client_that_sat_out_keeps_the_model_of_its_last_round(tmp_path: Path) -> None:
    config = config_of(tmp_path, fraction_train=0.5)
    config["trunk.quorum"] = 1.0
    grid, parsed = Overhearing(config), parse_run_config(config)
    run(grid, parsed)
    done = RunDirectory.open(tmp_path / "run")
    assert len(grid.trained) == 2  # each of them trained in one of the two rounds
    shared, trunk = done.read_adapter("client"), done.read_adapter("trunk")
    for line in [line for line in done.metrics("evaluation") if line["server_round"] == 2]:
        slot = int(str(line["partition_id"]))
        client = Client(RunCache(parsed), slot, CLIENTS)
        model, _ = client.kept.whole_model(client.own)
        expected = loss_under(model, {**grid.trained[slot], **trunk}, client)
        own = line["personal_sums"]["loss-sum"] / line["num_tokens"]  # type: ignore[index, call-overload, operator]
        assert own == pytest.approx(expected, rel=2e-5)
        is_last = all(torch.equal(grid.trained[slot][name], shared[name]) for name in shared)
        assert (line["personal_perplexity"] == line["perplexity"]) == is_last


def test_numbers_of_the_global_model_do_not_change(tmp_path: Path) -> None:
    results = []
    for personalised in (False, True):
        config = config_of(tmp_path) | {
            "evaluation.personalised": personalised,
            "run-dir": str(tmp_path / f"run-{personalised}"),
        }
        run(LocalGrid(CLIENTS, config), parse_run_config(config))
        done = RunDirectory.open(Path(str(config["run-dir"])))
        results.append((done.read_adapter("client"), done.metrics("evaluation")))
    (one, plain), (other, both) = results
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line["loss_sum"] for line in plain] == [line["loss_sum"] for line in both]
    assert not any(name.startswith("personal") for line in plain for name in line)
