"""What a client keeps on its disk: only what was committed is read, and the disk does not fill up."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from flower_split.config import RunConfig, StrategyConfig, TrainConfig
from flower_split.errors import FederationError, RunDirectoryError
from flower_split.runs.private_factors import (
    PrivateFolder,
    checked_digest,
    client_directory,
    digests_of,
    private_state,
)


def factors(value: float) -> dict[str, Tensor]:
    return {"m.lora_B.weight": torch.full((2, 1), value), "a.lora_B.weight": torch.ones(1, 2)}


def folder(tmp_path: Path, partition_id: int = 0) -> PrivateFolder:
    return PrivateFolder.of(tmp_path, "experiment-1", partition_id)


def test_read_gives_what_write_was_given(tmp_path: Path) -> None:
    digest = folder(tmp_path).write(factors(3.0), server_round=1, base="")
    found = folder(tmp_path).read(digest)
    assert list(found) == sorted(factors(3.0))
    assert folder(tmp_path).path.stat().st_mode & 0o077 == 0
    assert torch.equal(found["m.lora_B.weight"], torch.full((2, 1), 3.0))


def test_write_of_the_same_values_in_another_round_has_another_digest(tmp_path: Path) -> None:
    own = folder(tmp_path)
    first = own.write(factors(1.0), server_round=1, base="")
    assert own.write(factors(1.0), server_round=1, base="") == first
    assert own.write(factors(1.0), server_round=2, base=first) != first


def test_write_keeps_the_base_and_the_base_before_and_drops_what_was_never_committed(
    tmp_path: Path,
) -> None:
    own = folder(tmp_path)
    one = own.write(factors(1.0), server_round=1, base="")
    two = own.write(factors(2.0), server_round=2, base=one)
    aborted = own.write(factors(2.5), server_round=3, base=two)
    three = own.write(factors(3.0), server_round=3, base=two)
    assert torch.equal(own.read(one)["m.lora_B.weight"], torch.full((2, 1), 1.0))
    (own.path / f".round-3.{aborted}.safetensors.0a.tmp").write_bytes(b"killed while writing")
    four = own.write(factors(4.0), server_round=4, base=three)
    names = {path.name.split(".")[1] for path in own.path.iterdir()}
    assert names == {two, three, four}
    with pytest.raises(RunDirectoryError, match=r"not in .*client-dir"):
        own.read(aborted)


def test_write_of_a_process_that_was_given_up_takes_nothing_of_the_run_away(
    tmp_path: Path,
) -> None:
    own = folder(tmp_path)
    one = own.write(factors(1.0), server_round=1, base="")
    two = own.write(factors(2.0), server_round=2, base=one)  # of the second attempt: committed
    own.write(factors(2.5), server_round=2, base=one)  # of the first, which comes too late
    assert torch.equal(own.read(two)["m.lora_B.weight"], torch.full((2, 1), 2.0))
    three = own.write(factors(3.0), server_round=3, base=two)
    own.write(factors(2.6), server_round=2, base=one)
    own.read(two), own.read(three)


def kept(tmp_path: Path, origin: str) -> str:
    """Write a client's file as a version does whose header says ``origin``; returns its digest."""
    content = save(factors(2.0), metadata={"round-and-base": origin})
    digest = hashlib.sha256(content).hexdigest()
    path = folder(tmp_path).path
    path.mkdir(parents=True, exist_ok=True)
    (path / f"round-2.{digest}.safetensors").write_bytes(content)
    return digest


def test_file_from_before_formats_had_numbers_is_read_and_gone_on_from(tmp_path: Path) -> None:
    own = folder(tmp_path)
    first = own.write(factors(1.0), server_round=1, base="")
    old = kept(tmp_path, f"2 {first}")
    assert torch.equal(own.read(old)["m.lora_B.weight"], torch.full((2, 1), 2.0))
    own.write(factors(3.0), server_round=3, base=old)
    assert own.read(first)  # what the old file began with stays


def test_file_of_a_newer_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    newer = kept(tmp_path, "2  7")
    with pytest.raises(
        RunDirectoryError, match=r"round-2\..* has format 7, .*format 0 to 1: newer.*Upgrade"
    ):
        folder(tmp_path).read(newer)


def test_write_of_nan_is_refused_and_leaves_what_was_there(tmp_path: Path) -> None:
    own = folder(tmp_path)
    digest = own.write(factors(1.0), server_round=1, base="")
    with pytest.raises(FederationError, match=r"round 2: .*NaN or Inf in m\.lora_B\.weight"):
        own.write(factors(float("nan")), server_round=2, base=digest)
    assert [path.name for path in own.path.iterdir()] == [f"round-1.{digest}.safetensors"]


def test_read_of_a_damaged_file_names_it(tmp_path: Path) -> None:
    own = folder(tmp_path)
    digest = own.write(factors(1.0), server_round=1, base="")
    (path,) = own.path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(RunDirectoryError, match=r"round-1\..* is damaged"):
        own.read(digest)


def test_write_to_a_place_that_is_no_directory_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    own = PrivateFolder.of(tmp_path / "file", "x", 0)
    with pytest.raises(RunDirectoryError, match="cannot be written .*train.client-dir"):
        own.write(factors(1.0), server_round=1, base="")


@pytest.mark.parametrize("experiment", ["..", "../../elsewhere", "/etc", "a/b", "ü b", "."])
def test_folder_of_any_experiment_lies_in_the_clients_directory(
    tmp_path: Path, experiment: str
) -> None:
    own = PrivateFolder.of(tmp_path / "own", experiment, 1)
    assert own.path.resolve().parent.parent == (tmp_path / "own").resolve()
    digest = own.write(factors(1.0), server_round=1, base="")
    assert own.read(digest)


def test_folders_of_partitions_and_experiments_are_apart(tmp_path: Path) -> None:
    digest = folder(tmp_path, 0).write(factors(1.0), server_round=1, base="")
    for other in (folder(tmp_path, 1), PrivateFolder.of(tmp_path, "experiment-2", 0)):
        with pytest.raises(RunDirectoryError, match="not in"):
            other.read(digest)


@pytest.mark.parametrize("digest", ["", "x", "None", "*", "../" + "0" * 61, "0" * 63, "A" * 64])
def test_digest_that_is_none_is_refused(digest: str) -> None:
    with pytest.raises(FederationError, match="64 hexadecimal digits"):
        checked_digest(digest)


def test_private_state_survives_a_checkpoint() -> None:
    digests = {11: "ab" * 32, 2: "00" * 31 + "ff"}
    state = private_state(digests)
    assert digests_of({**state, "lora::m::factors.A": torch.ones(1)}) == digests
    assert all(tensor.dtype is torch.uint8 and tensor.shape == (32,) for tensor in state.values())


def config(client_dir: str) -> RunConfig:
    return RunConfig(
        train=TrainConfig(client_dir=client_dir), strategy=StrategyConfig(aggregator="fedsa-lora")
    )


def test_client_directory_is_the_nodes_before_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client_directory(config("run"), {"client-dir": "node"}, "hint") == Path("node")
    assert client_directory(config("run"), {}, "hint") == Path("run")
    monkeypatch.setenv("FLWR_HOME", "/flower")
    assert client_directory(config(""), {}, "hint") == Path("/flower/flower-split/clients")
    monkeypatch.setattr("flower_split.runs.private_factors.simulated_clients_at_once", lambda: 2)
    assert client_directory(config(""), {}, "hint") == Path("hint")
    assert client_directory(config(""), {"client-dir": "node"}, "hint") == Path("node")
