"""Everything that may train beside LoRA, through the ServerApp, real clients and a real trunk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.errors import RunDirectoryError
from flower_split.lora import attach_lora, load_adapter_state
from flower_split.messages.replies import weight_norms
from flower_split.parties.parts import all_parts, model_cuts
from flower_split.results.export import export_adapter
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from tests.processes.test_runs import central_step
from tests.support.flower_home import Flower
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.recording import RecordingGrid, arrays, assert_same_end, fail_commit
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]

VARIETIES: dict[str, dict[str, Scalar]] = {
    "dora, untied": {f"lora__{part}__use_dora": True for part in ("bottom", "trunk", "top")},
    "modules to save, untied": {
        "lora__bottom__modules_to_save": "embed_tokens",
        "lora__trunk__modules_to_save": "layers.1.mlp",
        "lora__top__modules_to_save": "model.norm",
    },
    "bias, untied": {
        "lora__bottom__bias": "all",
        "lora__trunk__bias": "lora_only",
        "lora__top__bias": "lora_only",
    },
    "head to save, tied": {"lora__top__modules_to_save": "lm_head"},
    "full top, untied": {"lora__top__train": "full"},
    "full bottom and top, tied": {"lora__bottom__train": "full", "lora__top__train": "full"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with biases that are not zero and norms that are not one."""
    found = {}
    for name in ("tied", "untied"):
        path = make_model(tmp_path_factory.mktemp(name))
        config = LlamaConfig.from_pretrained(
            path, attention_bias=True, mlp_bias=True, tie_word_embeddings=name == "tied"
        )
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
        for parameter_name, parameter in model.named_parameters():
            if "bias" in parameter_name or "norm" in parameter_name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(path)
        found[name] = path
    return found


@pytest.fixture(autouse=True)
def trunk_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)


def job(
    base: Path,
    root: Path,
    grid: Callable[[int, dict[str, Scalar]], LocalGrid] = LocalGrid,
    **changes: Scalar,
) -> RunDirectory:
    changes = {"trunk__step_every": "server-round", **changes}
    config = tiny_config(base, make_data(root / "data", 2), **changes)
    config["run-dir"] = str(root / "run")
    run(grid(2, config), parse_run_config(config))
    return RunDirectory.open(root / "run")


def recorded(base: Path, root: Path, **changes: Scalar) -> tuple[RunDirectory, list[Message]]:
    """A run, and what its clients returned in round 1."""
    grids: list[RecordingGrid] = []

    def grid(num_clients: int, config: dict[str, Scalar]) -> RecordingGrid:
        grids.append(RecordingGrid(num_clients, config))
        return grids[0]

    done = job(base, root, grid, **changes)
    return done, [reply for _, reply in grids[0].trained[1]]


def unsplit(config: RunConfig, state: dict[str, Tensor]) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    attach_lora(model, model_cuts(config), all_parts(config), seed=0)
    load_adapter_state(model, state)
    return model.eval()


@pytest.mark.parametrize("variety", VARIETIES)
def test_one_round_is_one_step_of_the_unsplit_model_and_exports_to_plain_peft(
    bases: dict[str, Path], tmp_path: Path, variety: str
) -> None:
    kind, base = variety.rsplit(", ", 1)
    done = job(bases[base], tmp_path, **VARIETIES[variety])
    found = done.read_adapter("client") | done.read_adapter("trunk")
    expected = central_step(done.config, 2)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    mark = {"dora": "lora_magnitude_vector", "bias": ".base_layer.bias"}
    assert any(name.endswith(mark.get(kind, ".weight")) for name in found if "lora_A" not in name)

    ids = torch.arange(5, 25).view(2, 10)
    plain = AutoModelForCausalLM.from_pretrained(bases[base])
    peft = PeftModel.from_pretrained(plain, str(export_adapter(done.path, tmp_path / "out")))
    logits = unsplit(done.config, expected)(input_ids=ids).logits
    torch.testing.assert_close(peft.eval()(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_run_of_processes_with_base_values_is_one_step_of_the_unsplit_model(
    flower: Flower, bases: dict[str, Path], tmp_path: Path
) -> None:
    changes = VARIETIES["dora, untied"] | {
        "lora__bottom__bias": "all",
        "lora__top__use_dora": False,
        "lora__top__train": "full",
    }
    config = tiny_config(bases["untied"], make_data(tmp_path / "data", 2), **changes)
    app = make_app(tmp_path / "app", {**config, "run-dir": str(tmp_path / "run")})
    done = flower.command("flower-split", "run", str(app))
    assert done.returncode == 0, done.stdout
    run = RunDirectory.open(tmp_path / "run")
    found = run.read_adapter("client") | run.read_adapter("trunk")
    expected = central_step(run.config, 2)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_resumed_run_with_base_values_ends_on_the_same_bits(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Scalar] = {
        "lora__bottom__use_dora": True,
        "lora__top__train": "full",
        "num_server_rounds": 2,
        "strategy__aggregator": "product-delta",
    }
    calm = job(bases["untied"], tmp_path / "calm", **changes)
    failed = fail_commit(monkeypatch, 2, RunDirectoryError("the disk is full"))
    with pytest.raises(RunDirectoryError, match="the disk is full"):
        job(bases["untied"], tmp_path / "killed", **changes)
    assert failed == [2]
    resumed = job(
        bases["untied"], tmp_path / "killed", resume=str(tmp_path / "killed/run"), **changes
    )
    assert_same_end(calm, resumed, ("client", "trunk"))


def dense_weight(model: torch.nn.Module, module: str, state: dict[str, Tensor]) -> Tensor:
    """What a linear layer with DoRA computes with, [out, in], fp64; scale is alpha / r = 4."""
    a, b = (state[f"{module}.lora_{factor}.weight"].double() for factor in "AB")
    direction = model.get_submodule(module).weight.detach().double() + 4.0 * b @ a
    magnitude = state[f"{module}.lora_magnitude_vector"].double()
    return (magnitude / direction.norm(dim=1))[:, None] * direction


@pytest.mark.parametrize(("dora", "distance"), [("exact", 1e-5), ("mean", 1e9)])
def test_magnitudes_after_a_round_are_the_row_norms_of_the_mean_of_the_clients(
    bases: dict[str, Path], tmp_path: Path, dora: str, distance: float
) -> None:
    changes: dict[str, Scalar] = {
        f"lora__{part}__{key}": value
        for part in ("bottom", "top")
        for key, value in (("use_dora", True), ("target_modules", "v_proj,down_proj"))
    }
    changes |= {"strategy__aggregator": "product-delta", "strategy__dora": dora}
    done, replies = recorded(
        bases["untied"], tmp_path, train__local_steps=8, train__batch_size=2, **changes
    )
    plain = LlamaForCausalLM.from_pretrained(bases["untied"]).requires_grad_(False)
    tokens = [float(str(reply.content["metrics"]["num-tokens"])) for reply in replies]
    states = [arrays(reply, "arrays") for reply in replies]
    found = done.read_adapter("client")
    for name in (n for n in found if n.endswith("lora_magnitude_vector")):
        module = name.removesuffix(".lora_magnitude_vector")
        mean = sum(
            n * dense_weight(plain, module, state)
            for n, state in zip(tokens, states, strict=True)
        ) / sum(tokens)  # fmt: skip
        error = float((found[name].double() - mean.norm(dim=1)).norm())
        step = float((mean - plain.get_submodule(module).weight.double()).norm())
        assert error < distance * step, name
        assert dora == "exact" or error > 1e-4 * step, name
        told = [bool(weight_norms(reply.content)) for reply in replies]
        assert told == [dora == "exact"] * len(replies)
