"""Clients with cut layers of their own through the whole ServerApp, with real clients and trunk."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message
from flwr.supercore.task_identity import TaskIdentity
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from flower_split.cli.main import main
from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.data import load_client_data, load_tokenizer
from flower_split.data.batches import collate
from flower_split.errors import ConfigError, FederationError, SplitError
from flower_split.lora import adapter_state, attach_lora
from flower_split.messages.client_facts import ClientFacts
from flower_split.parties.client_cuts import cut_notes, overlap_adapter
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import all_parts, client_cuts, model_cuts
from flower_split.results.export import export_adapter
from flower_split.results.generation import Sampling, open_generator
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from flower_split.server.federation.handshake import check_facts
from flower_split.split import CutLayers
from flower_split.trunk.build import make_engine
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_data, make_model, tiny_config

LAYERS = 6
WIDE = CutLayers(1, 5)
OWN = {0: WIDE, 1: CutLayers(2, 4), 2: CutLayers(3, 5)}
# Who trains a copy of its own of each of the trunk's layers; the others' calls run the trunk's.
HOLDERS = {1: (1, 2), 2: (2,), 3: (), 4: (1,)}


@dataclass(frozen=True)
class Job:
    """Runs tiny jobs in this process."""

    root: Path
    model: Path
    data: str

    def config(self, name: str, **changes: Scalar) -> dict[str, Scalar]:
        settings: dict[str, Scalar] = {
            "num_clients": 3,
            "model__first_cut": WIDE.first,
            "model__second_cut": WIDE.second,
            "model__cuts_by_partition": "1=2:4, 2=3:5",
            "trunk__step_every": "server-round",
            "lora__trunk__r": 3,
            "lora__trunk__alpha": 5.0,
        }
        config = tiny_config(self.model, self.data, **{**settings, **changes})
        return {**config, "run-dir": str(self.root / name)}

    def run(self, name: str, **changes: Scalar) -> RunDirectory:
        config = self.config(name, **changes)
        run(LocalGrid(3, config), parse_run_config(config))
        return RunDirectory.open(config["run-dir"])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("parts")
    return make_model(root / "model", LAYERS), make_data(root / "data", 3)


@pytest.fixture
def job(tmp_path: Path, parts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    return Job(tmp_path, *parts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, parts: tuple[Path, str]) -> RunDirectory:
    """Two rounds of one step over three clients; checked by several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
        for name in ("_run_id", "_node_id", "_task_id"):
            patch.setattr(TaskIdentity, name, 1)
        return Job(tmp_path_factory.mktemp("runs"), *parts).run("run", num_server_rounds=2)


def layer_of(name: str) -> int | None:
    return int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None


class Whole:
    """One client as an unsplit model with LoRA everywhere, on all of its training data."""

    def __init__(self, config: RunConfig, slot: int) -> None:
        self.config = config
        examples = load_client_data(config, load_tokenizer(config.model), slot, 3).train
        self.batch = collate(examples, 0)
        self.tokens = int((self.batch["labels"][:, 1:] != -100).sum())
        self.model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype="float32")
        attach_lora(self.model, model_cuts(config), all_parts(config), seed=config.seed)

    def gradients(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the mean token loss at ``state``, by name, in fp64."""
        own = {
            n.replace(".default.", "."): p for n, p in self.model.named_parameters() if "lora_" in n
        }
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        self.model.zero_grad(set_to_none=True)
        inputs = {name: t for name, t in self.batch.items() if name != "labels"}
        logits = self.model(**inputs).logits[:, :-1].flatten(0, 1)
        labels = self.batch["labels"][:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100).backward()
        return {name: p.grad.double() for name, p in own.items()}


def expected(config: RunConfig, rounds: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``(clients', trunk's)`` adapter, layer by layer by the rule, from unsplit models."""
    wholes = {slot: Whole(config, slot) for slot in OWN}
    start = adapter_state(wholes[0].model)
    trunk = {n: t.double() for n, t in start.items() if layer_of(n) in HOLDERS}
    client = {n: t.double() for n, t in start.items() if HOLDERS.get(layer_of(n), (0,))}
    rate = config.train.optimizer.learning_rate
    for _ in range(rounds):
        gradients = {}
        for slot, whole in wholes.items():
            own = {n: t for n, t in client.items() if slot in HOLDERS.get(layer_of(n), (slot,))}
            gradients[slot] = whole.gradients({**trunk, **own})
        for state, of_trunk in ((client, False), (trunk, True)):
            for name in state:
                holders = HOLDERS.get(layer_of(name), tuple(OWN))
                who = [slot for slot in OWN if (slot in holders) != of_trunk]
                tokens = sum(wholes[slot].tokens for slot in who)
                mean = sum(gradients[slot][name] * wholes[slot].tokens / tokens for slot in who)
                state[name] = state[name] - rate * mean
    return client, trunk


def test_two_rounds_equal_unsplit_models_layer_by_layer(finished: RunDirectory) -> None:
    client, trunk = expected(finished.config, 2)
    for part, wanted in (("client", client), ("trunk", trunk)):
        found = finished.read_adapter(part)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            error = float((found[name] - tensor).norm() / tensor.norm().clamp_min(1e-9))
            assert error < 1e-5, (part, name)
    shared = sorted(client.keys() & trunk.keys())
    assert {layer_of(name) for name in shared} == {1, 2, 4}
    assert any(not torch.equal(client[name], trunk[name]) for name in shared)


def test_both_copies_of_a_layer_begin_equal(finished: RunDirectory) -> None:
    state, scales = overlap_adapter(finished.config, OWN.values())
    assert {layer_of(name) for name in state} == {1, 2, 4}
    assert scales and set(scales.values()) == {5.0 / 3}
    engine = make_engine(finished.config)
    trunk = engine.adapter()
    engine.close()
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in state.items())


def test_report_says_who_has_cut_layers_of_its_own(finished: RunDirectory) -> None:
    report = (finished.path / "report.md").read_text()
    assert "partitions 1 at 2:4, 2 at 3:5" in report and "--cuts first:second" in report


# ---- export and generation


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 13).view(1, -1)).logits


def composed(done: RunDirectory, cuts: CutLayers) -> torch.nn.Module:
    """The model that a client with ``cuts`` computed, as an unsplit one."""
    whole = Whole(done.config, 0)
    state = {
        **done.read_adapter("client"),
        **{n: t for n, t in done.read_adapter("trunk").items()
           if cuts.first <= layer_of(n) < cuts.second},
    }  # fmt: skip
    whole.gradients({**adapter_state(whole.model), **state})
    return whole.model.eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("cuts", [None, CutLayers(2, 4), CutLayers(3, 5), WIDE], ids=str)
def test_export_gives_the_logits_of_a_client_with_these_cuts(
    finished: RunDirectory, cuts: CutLayers | None, tmp_path: Path
) -> None:
    out = export_adapter(finished.path, tmp_path / "out", cuts)
    base = AutoModelForCausalLM.from_pretrained(finished.config.model.name)
    found = logits(PeftModel.from_pretrained(base, str(out)).eval())
    torch.testing.assert_close(found, logits(composed(finished, cuts or WIDE)), rtol=0, atol=1e-5)
    others = [o for o in (WIDE, CutLayers(2, 4), CutLayers(3, 5)) if o != (cuts or WIDE)]
    assert all((found - logits(composed(finished, o))).abs().max() > 1e-4 for o in others)


def test_export_command_takes_cuts(
    finished: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(finished.path), "--out", str(out), "--cuts", "3:5"]) == 0
    assert set(json.loads((out / "adapter_config.json").read_text())["rank_pattern"].values()) <= {
        3,
        4,
    }
    assert main(["export", str(finished.path), "--out", str(tmp_path / "x"), "--cuts", "3-5"]) != 0
    assert 'written first:second, such as "3:5"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        (CutLayers(0, 4), "the run's trunk is 1:5"),
        (CutLayers(1, 3), "no client of the run held trunk layer 3.*clients held: 4"),
    ],
)
def test_export_with_cuts_that_no_client_can_have_had_is_refused(
    finished: RunDirectory, cuts: CutLayers, words: str, tmp_path: Path
) -> None:
    with pytest.raises(SplitError, match=words):
        export_adapter(finished.path, tmp_path / "out", cuts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cuts", [None, CutLayers(2, 4), CutLayers(3, 5)], ids=str)
def test_generator_computes_the_model_of_a_client_with_these_cuts(
    finished: RunDirectory, cuts: CutLayers | None
) -> None:
    with open_generator(finished.path, None, cuts) as generator:
        found = logits(generator.model)
        text = generator.continue_text("abc", Sampling(max_new_tokens=3))
    torch.testing.assert_close(found, logits(composed(finished, cuts or WIDE)), rtol=0, atol=1e-5)
    assert isinstance(text, str)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {"strategy__aggregator": "product-delta", "lora__rank_by_partition": "1=2"},
        pytest.param({"strategy__aggregator": "flora"}, marks=pytest.mark.slow),
        pytest.param({"strategy__aggregator": "fedex-lora"}, marks=pytest.mark.slow),
        pytest.param({"strategy__name": "fedbuff", "strategy__aggregator": "product-delta"},
                     marks=pytest.mark.slow),
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)  # fmt: skip
def test_other_methods_with_own_cuts_export_what_the_split_model_computes(
    job: Job, changes: dict[str, Scalar], tmp_path: Path
) -> None:
    done = job.run("run", num_server_rounds=2, fraction_evaluate=0.0, **changes)
    for cuts in (None, CutLayers(2, 4)):
        out = export_adapter(done.path, tmp_path / str(cuts), cuts)
        base = AutoModelForCausalLM.from_pretrained(done.config.model.name)
        plain = logits(base)
        exported = logits(PeftModel.from_pretrained(base, str(out)).eval())
        with open_generator(done.path, None, cuts) as generator:
            torch.testing.assert_close(logits(generator.model), exported, rtol=0, atol=1e-5)
        assert (exported - plain).abs().max() > 1e-3


# ---- modes, node configs, refusals


@pytest.mark.parametrize("mode", ["frozen", "forward-only"])
def test_layers_of_a_trunk_that_does_not_train_have_no_copy_that_does(job: Job, mode: str) -> None:
    done = job.run("run", mode=mode)
    assert {layer_of(name) for name in done.read_adapter("client")} == {0, 5}


def test_node_config_comes_before_the_run_config(job: Job) -> None:
    config = job.config("run", model__cuts_by_partition="1=2:4", fraction_evaluate=0.0)
    grid = LocalGrid(3, config)
    grid.contexts[101].node_config |= {"first-cut": 4, "second-cut": 5}
    run(grid, parse_run_config(config))
    done = RunDirectory.open(config["run-dir"])
    assert {layer_of(name) for name in done.read_adapter("client")} == {0, 1, 2, 3, 5}
    # Nobody else holds them: the trunk's copies and partition 1's have gone apart.
    assert "partitions 1 at 4:5" in (done.path / "report.md").read_text()


def test_layers_that_no_call_runs_are_named(job: Job) -> None:
    config = parse_run_config(job.config("run"))
    assert cut_notes(config, dict.fromkeys(OWN, WIDE)) == []
    assert len(cut_notes(config, OWN)) == 1
    both = cut_notes(config, {0: CutLayers(2, 5), 1: CutLayers(2, 4)})
    assert "run the trunk's layers 1:" in both[1] and "narrower span" in both[1]


class Interrupted(LocalGrid):
    """The ServerApp ends as it is about to begin the training of round 2."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            record = message.content.config_records.get("config", ConfigRecord())
            if (
                message.metadata.message_type == "train"
                and record.get("flower-split.server-round") == 2
            ):
                raise KeyboardInterrupt
        return super().push_messages(messages)


def test_resume_with_the_same_cuts_ends_on_the_same_bits_and_with_others_is_refused(
    job: Job, finished: RunDirectory
) -> None:
    config = job.config("part", num_server_rounds=2)
    grid = Interrupted(3, config)
    with pytest.raises(KeyboardInterrupt):
        run(grid, parse_run_config(config))
    resumed = {**config, "resume": config["run-dir"]}
    other = LocalGrid(3, resumed)
    other.contexts[102].node_config |= {"first-cut": 4}
    with pytest.raises(FederationError, match="clients that held other layers"):
        run(other, parse_run_config(resumed))
    run(LocalGrid(3, resumed), parse_run_config(resumed))
    part = RunDirectory.open(config["run-dir"])
    for name in ("client", "trunk"):
        mine, its = part.read_adapter(name), finished.read_adapter(name)
        assert mine.keys() == its.keys() and all(torch.equal(mine[n], its[n]) for n in its)


def facts(slot: int, cuts: CutLayers | None, config: RunConfig) -> ClientFacts:
    return ClientFacts(
        partition_id=slot,
        num_partitions=3,
        num_examples=1,
        num_eval_examples=1,
        planned_steps=1,
        concurrency=0,
        fingerprint=fingerprint(config),
        cuts=cuts,
    )


def test_handshake_refuses_cuts_beyond_the_trunk_that_is_there(job: Job) -> None:
    config = parse_run_config(job.config("run"))
    trunk = {**fingerprint(config), "cut-layers": "2:5"}  # started with another span
    answers = [(100, facts(0, WIDE, config)), (101, facts(1, CutLayers(2, 4), config))]
    with pytest.raises(FederationError) as caught:
        check_facts(
            answers, parse_run_config(job.config("run", model__cuts_by_partition="")), trunk
        )
    text = str(caught.value)
    assert (
        "partition 0 (node 100) is cut at 1:5" in text and "layers 2 to 4 (cut layers 2:5)" in text
    )
    assert "Give the client more layers" in text and "wider span" in text
    wider = {**trunk, "cut-layers": "0:6"}
    check_facts(answers, parse_run_config(job.config("run", model__cuts_by_partition="")), wider)


def test_handshake_refuses_cuts_of_a_partition_that_is_not_there(job: Job) -> None:
    config = parse_run_config(job.config("run", model__cuts_by_partition="7=2:4"))
    with pytest.raises(FederationError, match="names partition 7, which no client holds"):
        check_facts([(100, facts(0, WIDE, config))], config, fingerprint(config))


def test_clients_cuts_follow_node_config_then_partition_then_run(job: Job) -> None:
    config = parse_run_config(job.config("run"))
    assert [client_cuts(config, slot) for slot in (0, 1, 2)] == list(OWN.values())
    assert client_cuts(config, 1, {"first-cut": 3}) == CutLayers(3, 4)
    assert client_cuts(config, 0, {"second-cut": 2}) == CutLayers(1, 2)


@pytest.mark.parametrize(
    ("changes", "node", "words"),
    [
        ({}, {"first-cut": 0}, "partition 0 has the cut layers 0:5.*model.first-cut = 1"),
        ({}, {"second-cut": 1}, "0 has the cut layers 1:1.*at least one layer between"),
        ({}, {"first-cut": "2"}, "first-cut = '2'; it must be an integer"),
        ({"trunk__train": "full"}, {"first-cut": 2}, 'plain LoRA only; trunk.train is "full"'),
        ({"lora__trunk__use_dora": True}, {"first-cut": 2}, "plain LoRA only; lora.trunk.use-dora"),
    ],
)
def test_cuts_that_cannot_be_are_refused_with_the_reason(
    job: Job, changes: dict[str, Scalar], node: dict[str, object], words: str
) -> None:
    config = parse_run_config(job.config("run", model__cuts_by_partition="", **changes))
    with pytest.raises(ConfigError, match=words):
        client_cuts(config, 0, node)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1=0:4", "partition 1 has the cut layers 0:4; they must lie within the trunk's"),
        ("1=2:6", "model.second-cut = 5"),
        ("1=4:4", "at least one layer between"),
        ("1=2-4", "\"0=3:5, 2=4:6\"; '1=2-4' in it does not"),
        ("1=2:4, 1=2:3", "names partition 1 twice"),
    ],
)
def test_cuts_by_partition_are_checked_when_the_run_config_is_read(
    job: Job, text: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_run_config(job.config("run", model__cuts_by_partition=text))


def test_strategy_of_flower_refuses_other_modules_by_name(job: Job) -> None:
    with pytest.raises(ConfigError, match="other ranks or modules"):
        job.run("run", strategy__name="fedavg")


def test_client_without_anything_to_train_is_refused_at_the_start(job: Job) -> None:
    with pytest.raises(FederationError, match="partition 0 is cut at 0:6.*nothing to train"):
        job.run(
            "run",
            model__first_cut=0,
            model__second_cut=LAYERS,
            model__cuts_by_partition="1=2:4, 2=3:5",
        )


def test_robust_rule_of_the_trunk_works_on_who_passed_through(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        done = job.run("run", trunk__reduction="median")
    assert {layer_of(name) for name in done.read_adapter("trunk")} == {1, 2, 3, 4}
