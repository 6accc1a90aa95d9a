"""A trunk whose layers two processes divide: the numbers of a whole trunk, and one hash."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flower_split.config import RunConfig, parse_run_config
from flower_split.errors import (
    ConfigError,
    RefusalReason,
    SplitError,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.protocol.values import RoundBase
from flower_split.split import CutLayers, load_trunk_model
from flower_split.split.loading.tensor_parallel import loading_share
from flower_split.split.structure.kv_cache import CacheStep
from flower_split.trunk import follow
from flower_split.trunk.build import load_compute
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.weight_versions import Versions
from flower_split.trunk.serve import RunningTrunk, Serving
from tests.support.divided_layers import compare_divided
from tests.support.tiny_app import make_data, make_model, tiny_config
from tests.support.tiny_models import tiny_model
from tests.support.trunk_rounds import SLOTS, TOKEN, Run

HIDDEN = 32
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_neox", "granite")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("divided")
    return parse_run_config(
        tiny_config(
            make_model(root / "model"),
            make_data(root / "data", 3),
            num_clients=3,
            trunk__tensor_parallel=2,
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    assert not multiprocessing.active_children(), "a follower outlived its trunk"


def changed(config: RunConfig, **trunk: object) -> RunConfig:
    return replace(config, trunk=replace(config.trunk, **trunk))  # type: ignore[arg-type]


def whole_of(config: RunConfig) -> RunConfig:
    return changed(config, tensor_parallel=1)


def with_dropout(config: RunConfig, dropout: float) -> RunConfig:
    part = replace(config.lora.trunk, dropout=dropout)
    return replace(config, lora=replace(config.lora, trunk=part))


def two_rounds(
    config: RunConfig, checkpoints: Path, order: tuple[int, ...]
) -> tuple[str, dict[str, Tensor], int]:
    """Train two rounds; return the digest, the adapter, and how often a forward was made again."""
    serving = Serving(token=TOKEN, checkpoints=str(checkpoints))
    with RunningTrunk(config, serving) as trunk, closing(Run(config, trunk.port)) as run:
        first = run.round(1, 0, RoundBase(0), order)
        run.control.commit_round("e", 1, 0)
        second = run.round(2, 0, RoundBase(1, first.digest), order)
        again = run.control.status().activations.recomputes
        return second.digest, trunk.engine.compute.adapter(), again


@pytest.mark.parametrize("batches", ["off", "on"])
def test_rounds_give_one_hash_in_any_order_and_are_near_a_whole_trunks(
    config: RunConfig, folder: Path, batches: str
) -> None:
    divided = changed(config, window_batches=batches)
    digest, adapter, _ = two_rounds(divided, folder / "one", SLOTS)
    other, _, _ = two_rounds(divided, folder / "other", (2, 0, 1))
    assert digest == other
    _, whole, _ = two_rounds(whole_of(divided), folder / "whole", SLOTS)
    assert adapter.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(adapter[name], tensor, rtol=1e-3, atol=1e-5)


def test_checkpoint_of_divided_layers_is_one_of_whole_layers(
    config: RunConfig, folder: Path
) -> None:
    serving, whole = Serving(token=TOKEN, checkpoints=str(folder / "both")), whole_of(config)
    with RunningTrunk(config, serving) as trunk, closing(Run(config, trunk.port)) as run:
        first = run.round(1, 0, RoundBase(0), SLOTS)
        run.control.commit_round("e", 1, 0)
    with RunningTrunk(whole, serving) as trunk, closing(Run(whole, trunk.port)) as run:
        run.round(2, 0, RoundBase(1, first.digest), SLOTS)
        adapter = trunk.engine.compute.adapter()
    _, wanted, _ = two_rounds(whole, folder / "whole", SLOTS)
    for name, tensor in wanted.items():
        torch.testing.assert_close(adapter[name], tensor, rtol=1e-3, atol=1e-5)


def test_forward_that_is_made_again_has_the_same_dropout(config: RunConfig, folder: Path) -> None:
    dropping = with_dropout(config, 0.3)
    digest, _, none = two_rounds(dropping, folder / "kept", SLOTS)
    small = changed(dropping, activation_memory=2**-16)
    other, _, again = two_rounds(small, folder / "again", (1, 2, 0))
    assert none == 0 < again
    assert digest == other
    assert digest != two_rounds(config, folder / "without", SLOTS)[0]


@pytest.mark.parametrize("mode", ["joint", "frozen"])
def test_divided_trunk_computes_what_a_whole_one_does(
    config: RunConfig, folder: Path, mode: str
) -> None:
    config = replace(config, mode=mode)
    whole, given = load_compute(whole_of(config)), inputs()
    with RunningTrunk(config, Serving(token=TOKEN)) as trunk:
        compute = trunk.engine.compute
        assert compute.digest() == whole.digest()
        assert listening() <= {"127.0.0.1"} and os.environ["GLOO_SOCKET_IFNAME"] == "lo"
        assert [name for name, _ in compute.named] == [name for name, _ in whole.named]
        near(compute, whole, given)
        grad = 1e-3 * torch.ones_like(given["hidden_states"])
        mine, theirs = (
            one.backward(one.forward_train(given, seed_of="a")[1], grad)[0]
            for one in (compute, whole)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def listening() -> set[str]:
    """Return the addresses at which this process and its followers listen."""
    sockets = set()
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                sockets.add(os.readlink(descriptor))
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in sockets:
            found.add(".".join(str(byte) for byte in reversed(bytes.fromhex(local[:8]))))
    assert found, "gloo listens somewhere"
    return found


def test_divided_trunk_keeps_old_weights_and_says_what_it_cannot(
    config: RunConfig, folder: Path
) -> None:
    config, given = changed(config, max_evaluations=2), inputs()
    with RunningTrunk(config, Serving(token=TOKEN)) as trunk:
        compute = trunk.engine.compute
        old_weights_stay(compute, given)
        with pytest.raises(TrunkRefused) as refused:
            compute.spans.admit(CutLayers(2, 3))
        assert refused.value.reason is RefusalReason.FINGERPRINT_MISMATCH
        assert "2 processes divide them" in str(refused.value)
        with closing(Run(config, trunk.port)) as run, torch.no_grad():
            client = run.begin(1, 0, RoundBase(0))[0]
            client(given["hidden_states"])
            with pytest.raises(TrunkRefused, match="use_cache=False") as refused:
                client(given["hidden_states"], cache=CacheStep(id=1, step=0, past_length=0))
            assert refused.value.reason is RefusalReason.INVALID_REQUEST
        with pytest.raises(ConfigError, match="default process group"):
            RunningTrunk(config, Serving(token=TOKEN))
        assert torch.isfinite(compute.forward(given, train=False, seed_of="")).all()  # still there


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize(
    ("device", "compute"),
    [
        pytest.param("cpu", "fast", marks=pytest.mark.slow),
        pytest.param("cuda", "exact", marks=[pytest.mark.gpu, two_gpus]),
        pytest.param("cuda", "fast", marks=[pytest.mark.gpu, two_gpus]),
    ],
)
def test_rounds_on_gpus_and_of_compiled_layers_give_one_hash_too(
    config: RunConfig, folder: Path, device: str, compute: str
) -> None:
    divided = changed(config, device=device, compute=compute)
    digest, adapter, _ = two_rounds(divided, folder / "one", SLOTS)
    other, _, _ = two_rounds(divided, folder / "other", (2, 0, 1))
    assert digest == other
    _, whole, _ = two_rounds(whole_of(divided), folder / "whole", SLOTS)
    for name, tensor in whole.items():
        torch.testing.assert_close(adapter[name], tensor, rtol=1e-2, atol=1e-4)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "hidden_states": torch.randn(2, 6, HIDDEN, generator=generator),
        "attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]),
    }


def near(compute: TrunkCompute, whole: TrunkCompute, given: dict[str, Tensor]) -> None:
    seen = given["attention_mask"].bool()
    found, wanted = (one.forward(given, train=False, seed_of="") for one in (compute, whole))
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-4, atol=1e-4)


def old_weights_stay(compute: TrunkCompute, given: dict[str, Tensor]) -> None:
    """What a call was made with is what its backward, and a call on a former version, compute with."""
    old = Versions(2**20).copy_of(0, compute.parameters)
    first, kept = compute.forward_train(given, seed_of="a")
    with torch.no_grad():
        for parameter in compute.parameters:  # as the optimizer steps: in place
            parameter.add_(0.1)
    after, now = compute.forward_train(given, seed_of="a")
    again, former = compute.forward_train(given, seed_of="a", weights=old)
    assert torch.equal(first, again) and not torch.equal(first, after)
    grad = torch.full_like(first, 1e-3)
    mine, theirs, other = (compute.backward(one, grad)[1] for one in (kept, former, now))
    same = [torch.equal(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None]
    assert same and all(same)
    assert not all(torch.equal(a, b) for a, b in zip(mine, other, strict=True) if a is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_divided_layers_of_many_families(folder: Path, dtype: str) -> None:
    checkpoints = []
    for family in FAMILIES if dtype == "float32" else FAMILIES[:1]:
        checkpoints.append(folder / family)
        tiny_model(family).save_pretrained(checkpoints[-1])
    compare_divided(checkpoints, folder, dtype)


@pytest.mark.parametrize(
    ("family", "size", "why"),
    [
        ("gpt2", 2, "has no plan"),
        ("phi3", 2, "divides some by 'colwise_gather_output'"),
        ("mixtral", 2, "divides some by"),
        ("llama", 4, "num_key_value_heads of .* which is 2"),
        ("llama", 3, "num_attention_heads of .* which is 4"),
    ],
)
def test_layers_that_cannot_be_divided_are_refused_before_anything_is_read(
    tmp_path: Path, family: str, size: int, why: str
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SplitError, match=why):
        load_trunk_model(tmp_path.as_posix(), CutLayers(1, 3), tensor_parallel=size)


def test_quantised_weights_and_device_maps_are_refused(tmp_path: Path) -> None:
    model, cuts = tiny_model("llama"), CutLayers(1, 3)
    model.config.save_pretrained(tmp_path)
    divided = partial(load_trunk_model, tmp_path.as_posix(), cuts, tensor_parallel=2)
    with pytest.raises(SplitError, match="is quantised, and trunk.tensor-parallel = 2"):
        divided(quantization="bnb-4bit")
    with pytest.raises(SplitError, match="tensor_parallel = 2 divides every layer, and device_map"):
        divided(device_map="balanced")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(SplitError, match="is quantised, and trunk.tensor-parallel = 2"):
        divided()


def test_environment_names_the_device_while_a_share_is_loaded_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for before in (None, "7"):
        if before is None:
            monkeypatch.delenv("LOCAL_RANK", raising=False)
        else:
            monkeypatch.setenv("LOCAL_RANK", before)
        with loading_share(2, "cuda:3") as options:
            assert os.environ["LOCAL_RANK"] == "3" and options.keys() == {"distributed_config"}
        assert os.environ.get("LOCAL_RANK") == before


@pytest.mark.parametrize(
    "other",
    [
        {"trunk.replicas": 2, "trunk.window-batches": "on"},
        {"trunk.device-map": "balanced"},
        {"trunk.max-experiments": 2},
        {"trunk.train": "full"},
    ],
)
def test_what_does_not_go_with_divided_layers_is_refused(other: dict[str, str | int]) -> None:
    given = {"trunk.tensor-parallel": 2, "model.first-cut": 1, "model.second-cut": 3, **other}
    with pytest.raises(
        ConfigError, match=r"trunk\.tensor-parallel = 2 .* go together with trunk\."
    ):
        parse_run_config(given)


def test_process_that_ends_before_it_loads_is_named_at_once(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "run_rank", end_at_once)
    began = time.monotonic()
    with pytest.raises(TrunkUnavailable, match="rank 1 ended while it was to load"):
        RunningTrunk(config, Serving(token=TOKEN))
    assert time.monotonic() - began < 60


def end_at_once(pipe: object, config: RunConfig) -> None:
    """A follower that cannot even begin."""


def test_trunk_on_other_devices_than_torch_would_take_is_refused(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(ConfigError, match="over this host's cuda devices, and trunk.device is cpu"):
        RunningTrunk(config, Serving(token=TOKEN))
