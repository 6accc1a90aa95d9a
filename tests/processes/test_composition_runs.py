"""Real ``flwr run`` of Flower's strategies, wrappers and mods: by run config, and in an app's code."""

from pathlib import Path

import pytest
import torch

from flower_split.runs.directory import RunDirectory
from flower_split.server.federation.handshake import federation_config
from tests.support.flower_home import Flower
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config

CLIENTS = 3

SERVER_APP = """
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg, Strategy

from flower_split.server.inner.flower_strategies import InnerContext
from flower_split.server.app import make_server_app


def inner(context: InnerContext) -> Strategy:
    mean = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    return DifferentialPrivacyClientSideFixedClipping(mean, 0.0, 0.05, context.num_sampled)


app = make_server_app(inner)
"""
CLIENT_APP = """
from flwr.clientapp.mod import fixedclipping_mod

from flower_split.client.app import make_client_app

app = make_client_app([fixedclipping_mod])
"""


def trained(run: RunDirectory, part: str) -> bool:
    state = run.read_adapter(part)
    return all(bool(t.count_nonzero()) for n, t in state.items() if n.endswith("lora_B.weight"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fedadam", "client-adaptive", "own-code"])
def test_flwr_run_with_what_flower_composes_trains_clients_and_trunk(
    flower: Flower, tmp_path: Path, kind: str
) -> None:
    changes = {
        "fedadam": {"strategy__name": "fedadam", "strategy__options": "eta=0.02"},
        "client-adaptive": {
            "strategy__name": "fedavg",
            "strategy__aggregator": "ffa-lora",
            "strategy__weighting": "uniform",
            "privacy__mechanism": "client-adaptive",
            "privacy__clipping_norm": 0.05,
            "privacy__noise_multiplier": 0.2,
        },
        "own-code": {},
    }[kind]
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", CLIENTS)
    config = tiny_config(model, data, num_clients=CLIENTS, num_server_rounds=2, **changes)
    app = make_app(tmp_path / "app", {**config, "run-dir": str(tmp_path / "run")})
    if kind == "own-code":
        (app / "mine").mkdir()
        for name, text in (("server_app", SERVER_APP), ("client_app", CLIENT_APP)):
            (app / "mine" / f"{name}.py").write_text(text)
        project = (app / "pyproject.toml").read_text()
        project = project.replace("flower_split.server.app:app", "mine.server_app:app")
        project = project.replace("flower_split.client.app:app", "mine.client_app:app")
        (app / "pyproject.toml").write_text(project)
    outcome = flower.run(app, {}, federation_config(CLIENTS))
    assert outcome.status == "finished:completed", outcome.output
    run = RunDirectory.open(tmp_path / "run")
    assert trained(run, "client") and trained(run, "trunk")
    facts = run.summary()["facts"]
    assert isinstance(facts, dict)
    if kind == "client-adaptive":
        assert facts["privacy"] == kind
        norm = facts["privacy clipping norm"]
        assert isinstance(norm, float) and norm != 0.05
        assert "NO EPSILON" in outcome.output  # it is told while the run begins, too
    if kind == "own-code":
        assert facts["privacy clipping norm"] == 0.05
        begun = make_first(config)
        moved = {n: t - begun[n] for n, t in run.read_adapter("client").items()}
        length = torch.cat([t.flatten() for t in moved.values()]).norm()
        assert 0 < length <= 2 * 0.05 * 1.001  # two rounds, each a mean of clipped updates


def make_first(config: dict[str, bool | int | float | str]) -> dict[str, torch.Tensor]:
    """The clients' adapter before round 1."""
    from flower_split.config import parse_run_config
    from flower_split.lora import initial_client_adapter
    from flower_split.parties.parts import client_parts, model_cuts

    parsed = parse_run_config(config)
    state, _ = initial_client_adapter(
        parsed.model.name, model_cuts(parsed), client_parts(parsed), seed=parsed.seed
    )
    return state
