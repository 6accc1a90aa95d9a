"""FedSA-LoRA with real clients: B stays on a client's disk, exactly once, as the paper's algorithm."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict
from flwr.supercore.task_identity import TaskIdentity
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from flower_split.cli.main import FAILED, WRONG_USE, main
from flower_split.client.client import Client
from flower_split.client.model_cache import RunCache
from flower_split.config import ModelConfig, RunConfig, Scalar
from flower_split.errors import FederationError, RoundLost, RunDirectoryError, TrunkUnavailable
from flower_split.lora import adapter_state, attach_lora, load_adapter_state
from flower_split.parties.parts import client_parts, model_cuts
from flower_split.results.client_adapter import OneClient
from flower_split.results.export import export_adapter
from flower_split.results.generation import open_generator
from flower_split.runs.directory import RunDirectory
from flower_split.runs.manifest import FOLDER, RunCheckpoints
from flower_split.runs.private_factors import PrivateFolder, digests_of
from flower_split.training.loss import evaluate
from flower_split.training.round import train_round
from tests.support.local_grid import TrunkHere
from tests.support.recording import CLIENTS, ROUNDS, Job, Outcome, State, arrays, fail_commit
from tests.support.tiny_app import make_data, make_model

METHOD = "fedsa-lora"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("parts")
    return make_model(root / "model"), make_data(root / "data", CLIENTS)


@pytest.fixture(scope="module")
def calm_job(tmp_path_factory: pytest.TempPathFactory, parts: tuple[Path, str]) -> Iterator[Job]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
        for name in ("_run_id", "_node_id", "_task_id"):  # this lives longer than a test's own
            patch.setattr(TaskIdentity, name, 1)
        yield Job(tmp_path_factory.mktemp("calm"), *parts)


@pytest.fixture(scope="module")
def calm(calm_job: Job) -> Outcome:
    """A run that nothing happened to."""
    return calm_job.run("run", METHOD, **own_dir(calm_job))


@pytest.fixture
def job(tmp_path: Path, parts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    return Job(tmp_path, *parts)


def own_dir(job: Job) -> dict[str, Scalar]:
    return {"train__client_dir": str(job.root / "own")}


def is_b(name: str) -> bool:
    """B of ΔW = B A; PEFT's embeddings have it in their A."""
    return name.endswith(("lora_B.weight", "lora_embedding_A"))


def committed(run: RunDirectory) -> tuple[str, dict[int, str]]:
    """The experiment, and the committed digest of every client."""
    last = RunCheckpoints(run.path / FOLDER).latest()
    assert last is not None
    return last.entry.experiment, digests_of(last.strategy)


def own_factors(run: RunDirectory) -> dict[int, State]:
    """Partition → its B after the last round, from its own directory."""
    experiment, digests = committed(run)
    root = Path(run.config.train.client_dir)
    return {
        slot: PrivateFolder.of(root, experiment, slot).read(digest)
        for slot, digest in digests.items()
    }


def by_hand(
    config: RunConfig, participants: dict[int, list[int]]
) -> tuple[State, dict[int, State]]:
    """The paper's algorithm on the unsplit model: mean A, and every client's own B.

    Args:
        config: The run's; its trunk trains nothing.
        participants: Round → the partitions that trained in it.
    """
    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    attach_lora(model, model_cuts(config), client_parts(config), seed=config.seed)
    initial = adapter_state(model)
    shared = {name: tensor for name, tensor in initial.items() if not is_b(name)}
    own = {slot: {n: t for n, t in initial.items() if is_b(n)} for slot in range(CLIENTS)}
    for server_round, slots in sorted(participants.items()):
        sums: dict[str, Tensor] = {name: torch.zeros(1).double() for name in shared}
        tokens = 0
        for slot in slots:
            client = Client(RunCache(config), slot, CLIENTS)
            load_adapter_state(model, shared | own[slot])
            position = client.position(server_round)
            result = train_round(model, client.batches(server_round), config, position, None)
            state = adapter_state(model)
            own[slot] = {name: state[name] for name in own[slot]}
            sums = {n: total + result.num_tokens * state[n].double() for n, total in sums.items()}
            tokens += result.num_tokens
        shared = {name: (total / tokens).float() for name, total in sums.items()}
    return shared, own


@pytest.mark.parametrize("fraction", [1.0, 0.67])
def test_run_is_the_papers_algorithm_on_the_unsplit_model(job: Job, fraction: float) -> None:
    outcome = job.run("run", METHOD, mode="frozen", fraction_train=fraction, **own_dir(job))
    participants = {
        server_round: [message.metadata.dst_node_id - 100 for message, _ in pairs]
        for server_round, pairs in outcome.trained.items()
    }
    absent = sum(CLIENTS - len(slots) for slots in participants.values())
    assert absent == (0 if fraction == 1 else ROUNDS)
    shared, own = by_hand(outcome.directory.config, participants)
    client = outcome.directory.read_adapter("client")
    assert {name for name in client if not is_b(name)} == shared.keys()
    for name, expected in shared.items():
        torch.testing.assert_close(client[name], expected, rtol=1e-4, atol=1e-6)
    found = own_factors(outcome.directory)
    assert found.keys() == {slot for slots in participants.values() for slot in slots}
    for slot, state in found.items():
        assert state.keys() == own[slot].keys()
        for name, expected in own[slot].items():
            torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-6)
            assert not torch.allclose(state[name], own[(slot + 1) % CLIENTS][name])


def names_in(content: RecordDict) -> set[str]:
    return {name for record in content.array_records.values() for name in record}


def test_no_message_carries_a_factor_that_stays_with_a_client(calm: Outcome) -> None:
    finals = own_factors(calm.directory)
    bits = {tuple(t.flatten().tolist()) for state in finals.values() for t in state.values()}
    for server_round, pairs in calm.trained.items():
        for message, reply in pairs:
            assert not any(is_b(name) for name in names_in(reply.content))
            assert names_in(reply.content)
            sent = arrays(message, "arrays")
            assert any(is_b(name) for name in sent) == (server_round == 1)
            assert all(not t.any() for name, t in sent.items() if is_b(name))  # the initial one
            for tensor in arrays(reply, "arrays").values():
                assert tuple(tensor.flatten().tolist()) not in bits
    assert calm.trained.keys() == set(range(1, ROUNDS + 1))


def test_bytes_of_a_round_are_about_half_of_fedits(calm: Outcome, job: Job) -> None:
    def size(outcome: Outcome, which: int) -> int:
        pair = outcome.trained[ROUNDS][0]
        return pair[which].content.array_records["arrays"].count_bytes()

    fedit = job.run("fedit", "fedit")
    for which in (0, 1):  # down, up
        assert size(calm, which) < 0.7 * size(fedit, which)


def assert_same_end(one: RunDirectory, two: RunDirectory) -> None:
    for part in ("client", "trunk"):
        expected, found = one.read_adapter(part), two.read_adapter(part)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    first, second = own_factors(one), own_factors(two)
    assert first.keys() == second.keys() == set(range(CLIENTS))
    for slot, state in first.items():
        assert all(torch.equal(second[slot][name], state[name]) for name in state)


def test_round_that_was_lost_leaves_no_factors_to_go_on_from(
    calm: Outcome, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = fail_commit(monkeypatch, 2, RoundLost("the connection was lost"))
    again = job.run("again", METHOD, **own_dir(job))
    assert failed == [2] and len(again.trained[2]) == 2 * CLIENTS
    assert_same_end(calm.directory, again.directory)


def test_client_that_died_after_keeping_its_factors_trains_the_round_again(
    calm: Outcome, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, died = PrivateFolder.write, []

    def dying(self: PrivateFolder, state: State, *, server_round: int, base: str) -> str:
        digest = write(self, state, server_round=server_round, base=base)
        if server_round == 2 and not died:
            died.append(self.path.name)
            raise TrunkUnavailable("the process was killed before it could answer")
        return digest

    monkeypatch.setattr(PrivateFolder, "write", dying)
    again = job.run("again", METHOD, **own_dir(job))
    assert len(died) == 1 and len(again.trained[2]) > CLIENTS
    assert_same_end(calm.directory, again.directory)


def test_resumed_run_goes_on_from_committed_factors(
    calm: Outcome, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_commit(monkeypatch, 3, RunDirectoryError("the disk is full"))
    with pytest.raises(RunDirectoryError, match="the disk is full"):
        job.run("killed", METHOD, **own_dir(job))
    config = job.config("killed", METHOD, **own_dir(job))
    resumed = job.go("killed", {**config, "resume": str(job.root / "killed")})
    assert sorted(resumed.trained) == [3]
    assert_same_end(calm.directory, resumed.directory)


def test_run_that_goes_back_one_round_finds_the_factors_of_that_round(
    calm: Outcome, calm_job: Job
) -> None:
    before = own_factors(calm.directory)
    config = calm_job.config("run", METHOD, **own_dir(calm_job))
    config |= {"resume": str(calm_job.root / "run"), "resume-previous": True}
    resumed = calm_job.go("run", config)
    assert sorted(resumed.trained) == [ROUNDS]
    after = own_factors(resumed.directory)
    for slot, state in before.items():
        assert all(torch.equal(after[slot][name], state[name]) for name in state)


def test_client_keeps_two_generations_and_nothing_else(calm: Outcome) -> None:
    experiment, digests = committed(calm.directory)
    root = Path(calm.directory.config.train.client_dir)
    for slot in range(CLIENTS):
        folder = PrivateFolder.of(root, experiment, slot)
        rounds = sorted(path.name.split(".")[0] for path in folder.path.iterdir())
        # Of the last round, what it began with, and the one before.
        assert rounds == ["round-1", "round-2", "round-3"]
        assert len(list(folder.path.glob(f"*{digests[slot]}*"))) == 1


def test_client_that_lost_its_factors_is_named(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_commit(monkeypatch, 3, RunDirectoryError("the disk is full"))
    with pytest.raises(RunDirectoryError, match="the disk is full"):
        job.run("killed", METHOD, **own_dir(job))
    (run,) = (job.root / "own").iterdir()
    shutil.rmtree(run / "partition-1")
    config = job.config("killed", METHOD, **own_dir(job))
    with pytest.raises(FederationError, match=r"partition 1 .*own factors .*client-dir"):
        job.go("killed", {**config, "resume": str(job.root / "killed")})


def test_server_keeps_digests_only(calm: Outcome) -> None:
    last = RunCheckpoints(calm.directory.path / FOLDER).latest()
    assert last is not None
    trained = [name for name in last.strategy if "::" in name and name.endswith("factors.B")]
    assert trained and not any(last.strategy[name].any() for name in trained)
    assert json.dumps(committed(calm.directory)[1])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
def test_export_of_one_client_is_the_model_that_this_client_evaluated(
    calm: Outcome, tmp_path: Path
) -> None:
    run = calm.directory
    reported = {
        int(str(record["partition_id"])): float(str(record["loss_sum"]))
        for record in run.metrics("evaluation")
        if record["server_round"] == ROUNDS
    }
    losses = {}
    for slot in range(CLIENTS):
        out = tmp_path / str(slot)
        export_adapter(run.path, out, client=OneClient(partition_id=slot))
        base = AutoModelForCausalLM.from_pretrained(run.config.model.name)
        model = PeftModel.from_pretrained(base, str(out)).get_base_model()
        for partition in (slot, (slot + 1) % CLIENTS):
            client = Client(RunCache(run.config), partition, CLIENTS)
            result = evaluate(model, client.eval_batches(), torch.device("cpu"), ModelConfig())
            losses[slot, partition] = result.loss_sum
    for slot in range(CLIENTS):
        assert losses[slot, slot] == pytest.approx(reported[slot], rel=1e-5)
        previous = (slot - 1) % CLIENTS  # another client's model on this client's data
        assert losses[previous, slot] != pytest.approx(reported[slot], rel=1e-3)


def test_export_without_a_client_says_that_there_is_no_global_adapter(
    calm: Outcome, tmp_path: Path
) -> None:
    with pytest.raises(RunDirectoryError, match=r"no global adapter.*--client PARTITION"):
        export_adapter(calm.directory.path, tmp_path / "out")
    with pytest.raises(RunDirectoryError, match=r"partition 7 took part in no committed round"):
        export_adapter(calm.directory.path, tmp_path / "out", client=OneClient(partition_id=7))
    elsewhere = OneClient(partition_id=0, client_dir=tmp_path / "nowhere")
    with pytest.raises(RunDirectoryError, match="own factors .* are not in .*nowhere"):
        export_adapter(calm.directory.path, tmp_path / "out", client=elsewhere)
    assert not (tmp_path / "out").exists()


def test_generate_with_a_client_uses_its_own_model(
    calm: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(calm.directory.path)
    arguments = ["generate", path, "--prompt", "00", "--max-new-tokens", "4"]
    assert main(arguments) == FAILED
    assert "--client PARTITION" in capsys.readouterr().err
    assert main([*arguments, "--client-dir", "x"]) == WRONG_USE
    with open_generator(calm.directory.path, client=OneClient(partition_id=2)) as generator:
        state = adapter_state(generator.model)
    own = own_factors(calm.directory)[2]
    assert own and all(torch.equal(state[name], tensor) for name, tensor in own.items())
    assert main([*arguments, "--client", "2"]) == 0
