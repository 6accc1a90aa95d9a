"""A trunk that dies anywhere goes on from its checkpoint, bit for bit, or says what is wrong."""

import json
import time
from pathlib import Path

import pytest
import torch

from flower_split.config import OptimizerConfig
from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused
from flower_split.protocol.values import RoundBase
from flower_split.runtime import failpoints
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.toy_trunk import HIDDEN, ToyClient, make_engine, make_plan

ADAMW = OptimizerConfig(name="adamw", learning_rate=0.1, schedule="linear")
ROUNDS = 4


def batch(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(seed))


class Run:
    """A coordinator of one client, with a manifest that is only a value."""

    def __init__(self, directory: Path, optimizer: OptimizerConfig = ADAMW) -> None:
        self.directory = directory
        self.optimizer = optimizer
        self.base = RoundBase(0)
        self.attempt = 0
        self.engine: TrunkEngine | None = None
        self.start()

    def start(self) -> None:
        """A new trunk process."""
        if self.engine is not None:
            self.engine.close()
        self.engine = make_engine(
            optimizer=self.optimizer, dropout=0.5, checkpoints=CheckpointStore(self.directory)
        )

    def prepare(self, server_round: int) -> RoundBase:
        self.engine.begin_round(
            make_plan(
                (0,),
                server_round=server_round,
                attempt=self.attempt,
                base=self.base,
                num_server_rounds=ROUNDS,
            )
        )
        client = ToyClient(self.engine, 0, 2)
        for window in range(2):
            client.forward(batch(10 * server_round + window), window)
            client.backward(batch(100 + 10 * server_round + window), window)
        report = self.engine.prepare_round("test", server_round, self.attempt, time.monotonic() + 9)
        return RoundBase(server_round, report.digest)

    def round(self, server_round: int) -> None:
        self.base = self.prepare(server_round)  # the manifest's rename: the commit point
        self.engine.commit_round("test", server_round, self.attempt)

    def weight(self) -> torch.Tensor:
        return self.engine.adapter()["weight"]

    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory.rglob("trunk-*.json"))


@pytest.fixture
def expected(tmp_path):
    """The weights of a run in which nothing dies."""
    run = Run(tmp_path / "expected")
    for server_round in range(1, ROUNDS + 1):
        run.round(server_round)
    run.engine.close()
    return _final(tmp_path / "expected")


def _final(directory: Path) -> torch.Tensor:
    """The last round's weights, read by an engine of its own."""
    record = json.loads(next(directory.rglob(f"trunk-{ROUNDS}.json")).read_text())
    store = CheckpointStore(directory)
    return store.load("test", ROUNDS, record["digest"])[1]["parameter/weight"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_restart_after_every_commit_is_bit_identical(tmp_path, optimizer):
    finals = []
    for restarts in (False, True):
        config = OptimizerConfig(name=optimizer, learning_rate=0.1, schedule="linear")
        run = Run(tmp_path / str(restarts), config)
        for server_round in range(1, ROUNDS + 1):
            run.round(server_round)
            if restarts:
                run.start()
        run.engine.close()
        finals.append(_final(tmp_path / str(restarts)))
    assert torch.equal(finals[0], finals[1])


def test_restart_without_the_optimizers_state_would_differ(tmp_path, expected):
    run = Run(tmp_path / "run")
    run.round(1)
    run.start()
    load = run.engine.compute.load_state_tensors

    def parameters_only(tensors, version):
        load({n: t for n, t in tensors.items() if n.startswith("parameter/")}, version)

    run.engine.compute.load_state_tensors = parameters_only
    for server_round in range(2, ROUNDS + 1):
        run.round(server_round)
    assert not torch.equal(run.weight(), expected)
    run.engine.close()


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("trunk.prepare.before", False),
        ("trunk.prepare.tensors-written", False),
        ("trunk.prepare.written", False),
        ("trunk.prepare.answering", False),
        ("trunk.prepare.answering", True),
        ("trunk.commit.before", True),
        ("trunk.commit.after", True),
        ("trunk.step.before", False),
        ("trunk.step.after", False),
    ],
)
def test_trunk_that_dies_in_round_2_ends_on_the_same_bits(tmp_path, expected, place, named):
    """``named``: whether the coordinator had renamed its manifest when the trunk died."""
    run = Run(tmp_path / "run")
    run.round(1)
    failpoints.switch_on(place, "raise")
    # The process ends at the place: the engine is dropped with whatever it holds.
    with pytest.raises((OSError, RoundAborted, TrunkRefused)):
        run.round(2)
    assert failpoints.fired() == {place}
    if named:
        run.base = RoundBase(
            2, json.loads(next(run.directory.rglob("trunk-2.json")).read_text())["digest"]
        )
    failpoints.reset()
    run.start()
    run.attempt += 1
    for server_round in range(run.base.server_round + 1, ROUNDS + 1):
        run.round(server_round)
    assert torch.equal(run.weight(), expected)
    run.engine.close()


def test_prepared_round_that_the_manifest_names_is_committed_without_a_restart(tmp_path, expected):
    run = Run(tmp_path / "run")
    run.round(1)
    run.base = run.prepare(2)  # the coordinator dies after its manifest, before CommitRound
    run.attempt = 7
    for server_round in (3, 4):
        run.round(server_round)
    assert torch.equal(run.weight(), expected)
    run.engine.close()


def test_prepared_round_that_the_manifest_does_not_name_is_discarded(tmp_path, expected):
    run = Run(tmp_path / "run")
    run.round(1)
    run.prepare(2)  # the coordinator dies before its manifest
    assert "trunk-2.json" in run.files()
    run.attempt = 1
    run.engine.begin_round(make_plan((0,), server_round=2, attempt=9, base=run.base))
    assert run.files() == ["trunk-1.json"]
    for server_round in (2, 3, 4):
        run.round(server_round)
    assert torch.equal(run.weight(), expected)
    run.engine.close()


def test_the_two_latest_rounds_are_kept(tmp_path):
    run = Run(tmp_path / "run")
    for server_round in range(1, ROUNDS + 1):
        run.round(server_round)
    assert run.files() == ["trunk-3.json", "trunk-4.json"]
    assert len(list(run.directory.rglob("*.safetensors"))) == 2
    run.engine.close()


def first_data_byte(content: bytearray) -> int:
    """Of a safetensors file: in an optimizer tensor, which no digest of the parameters covers."""
    if content[:1] == b"{":
        return len(content) // 2
    return 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("file", ["trunk-2.json", "trunk-2.*.safetensors"])
@pytest.mark.parametrize("damage", ["torn", "bit-flipped", "missing"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used_on_request(
    tmp_path, expected, file, damage
):
    run = Run(tmp_path / "run")
    run.round(1)
    before = run.base
    run.round(2)
    (path,) = run.directory.rglob(file)
    content = bytearray(path.read_bytes())
    if damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "bit-flipped":
        content[first_data_byte(content)] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    run.start()
    with pytest.raises(TrunkRefused) as info:
        run.round(3)
    assert info.value.reason is RefusalReason.NO_CHECKPOINT
    assert "trunk-2" in str(info.value)
    run.base = before
    for server_round in (2, 3, 4):
        run.round(server_round)
    assert torch.equal(run.weight(), expected)
    run.engine.close()


@pytest.mark.parametrize("place", ["file.write.half", "file.write.before-rename"])
@pytest.mark.parametrize("hit", [1, 2])  # the tensors' file, the JSON file
def test_full_disk_gives_the_round_up_and_leaves_the_checkpoint_before(
    tmp_path, expected, place, hit
):
    run = Run(tmp_path / "run")
    run.round(1)
    failpoints.switch_on(place, "enospc", at=hit)
    with pytest.raises(RoundAborted, match="cannot be written.*No space left"):
        run.round(2)
    assert failpoints.fired() == {place}
    assert run.files() == ["trunk-1.json"]
    assert not list(run.directory.rglob("*.tmp"))
    run.start()  # from the disk alone
    run.attempt = 1
    for server_round in (2, 3, 4):
        run.round(server_round)
    assert torch.equal(run.weight(), expected)
    run.engine.close()


def test_restarted_trunk_without_checkpoints_refuses_to_go_on(tmp_path):
    run = Run(tmp_path / "run")
    run.round(1)
    engine = make_engine(optimizer=ADAMW)
    with pytest.raises(TrunkRefused, match="no checkpoint directory") as info:
        engine.begin_round(make_plan((0,), server_round=2, base=run.base))
    assert info.value.reason is RefusalReason.NO_CHECKPOINT
    engine.close()
    run.engine.close()


def test_experiment_named_like_a_path_stays_in_its_directory(tmp_path):
    store = CheckpointStore(tmp_path / "inside")
    store.save({"parameter/w": torch.ones(1)}, experiment="../../outside", server_round=1,
               attempt=0, version=1, digest="d", ledger="0")  # fmt: skip
    assert {path.parent.parent for path in tmp_path.rglob("*.json")} == {tmp_path / "inside"}
    assert store.load("../../outside", 1, "d")[0].version == 1


def written(directory: Path) -> tuple[Path, dict[str, object]]:
    """The checkpoint of a round with one weight, and its record."""
    CheckpointStore(directory).save(
        {"parameter/weight": torch.arange(3.0)},
        experiment="test",
        server_round=1,
        attempt=0,
        version=2,
        digest="of the weight",
        ledger="",
    )
    (path,) = directory.rglob("trunk-1.json")
    return path, json.loads(path.read_text())


def test_record_says_its_format(tmp_path):
    assert written(tmp_path)[1]["format"] == 1


def test_checkpoint_from_before_formats_had_numbers_is_read(tmp_path):
    path, record = written(tmp_path)
    old = {
        "experiment": "test",
        "server_round": 1,
        "attempt": 0,
        "version": 2,
        "digest": "of the weight",
        "file": record["file"],
        "file_sha256": record["file_sha256"],
        "ledger": "",
    }
    path.write_text(json.dumps(old))
    found, tensors = CheckpointStore(tmp_path).load("test", 1, "of the weight")
    assert found.version == 2
    assert torch.equal(tensors["parameter/weight"], torch.arange(3.0))


def test_checkpoint_of_a_newer_format_is_refused_with_both_numbers_and_left_alone(tmp_path):
    path, record = written(tmp_path)
    path.write_text(json.dumps({**record, "format": 7, "a field": "of that version"}))
    store = CheckpointStore(tmp_path)
    with pytest.raises(
        TrunkRefused, match=r"trunk-1\.json has format 7, .*reads format 0 to 1: newer.*Upgrade"
    ) as info:
        store.load("test", 1, "of the weight")
    assert info.value.reason is RefusalReason.NO_CHECKPOINT
    store.prune("test", 1)
    assert (path.parent / str(record["file"])).exists()
