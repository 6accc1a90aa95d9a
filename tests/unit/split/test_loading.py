"""Loading a part of a checkpoint: right, and nothing else read."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
import transformers.modeling_utils
from transformers import LlamaConfig, LlamaForCausalLM

from flower_split.config import ModelConfig
from flower_split.errors import SplitError
from flower_split.split import (
    CutLayers,
    load_client_model,
    load_trunk_model,
    load_whole_model,
    set_trunk,
)
from flower_split.split.client_side.trunk_slot import IdentityTrunk
from flower_split.split.loading import checkpoint as source_module
from flower_split.split.loading.model_source import ModelSource
from tests.support.tiny_models import (
    FAMILIES,
    assert_same_bits,
    loss_and_gradients,
    padded_batch,
    tiny_model,
)

CUTS = CutLayers(1, 3)


@pytest.fixture(autouse=True)
def _no_progress_bar() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def tensors_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the tensors whose content is read from safetensors files."""
    names: set[str] = set()

    class Slice:
        def __init__(self, name: str, inner: object) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, index: object) -> torch.Tensor:
            names.add(self.name)
            return self.inner[index]

        def __getattr__(self, attribute: str) -> object:
            return getattr(self.inner, attribute)

    class File:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.inner = safetensors.safe_open(*args, **kwargs)

        def __enter__(self) -> "File":
            return self

        def __exit__(self, *exception: object) -> None:
            self.inner.__exit__(*exception)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

        def get_tensor(self, name: str) -> torch.Tensor:
            names.add(name)
            return self.inner.get_tensor(name)

        def __getattr__(self, attribute: str) -> object:
            return getattr(self.inner, attribute)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", File)
    return names


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_parts_match_the_whole_model_bitwise(
    family: str, sharded: bool, tmp_path: Path
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    trunk = load_trunk_model(str(tmp_path), CUTS).train()
    client = load_client_model(str(tmp_path), CUTS, trunk).train()
    assert type(client) is type(model)
    loss, gradients = loss_and_gradients(model, padded_batch())
    split_loss, split_gradients = loss_and_gradients(client, padded_batch(), trunk)
    assert torch.equal(loss, split_loss)
    assert_same_bits(gradients, split_gradients)


@pytest.mark.parametrize("cuts", [CutLayers(0, 4), CutLayers(0, 2), CutLayers(2, 4)], ids=str)
@pytest.mark.parametrize("family", ["llama", "bloom", "falcon"])
def test_loaded_parts_cuts_at_the_ends_match(family: str, cuts: CutLayers, tmp_path: Path) -> None:
    model = tiny_model(family).eval()
    model.save_pretrained(tmp_path)
    trunk = load_trunk_model(str(tmp_path), cuts)
    client = load_client_model(str(tmp_path), cuts, trunk)
    assert torch.equal(client(**padded_batch()).logits, model(**padded_batch()).logits)


@pytest.mark.parametrize("max_shard_size", ["20KB", "1GB"])
def test_loading_reads_the_owned_tensors_only(
    max_shard_size: str, tmp_path: Path, tensors_read: set[str]
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    inside = {n for n in model.state_dict() if ".layers.1." in n or ".layers.2." in n}
    load_client_model(str(tmp_path), CUTS, IdentityTrunk())
    assert tensors_read == set(model.state_dict()) - inside
    assert len(tensors_read) == 21
    tensors_read.clear()
    load_trunk_model(str(tmp_path), CUTS)
    assert tensors_read == inside
    tensors_read.clear()
    LlamaForCausalLM.from_pretrained(tmp_path)  # the count itself works on a whole model
    assert tensors_read == set(model.state_dict())


def test_loading_a_part_says_nothing_of_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    capfd.readouterr()
    load_trunk_model(str(tmp_path), CUTS)
    load_client_model(str(tmp_path), CUTS, IdentityTrunk())
    told = capfd.readouterr()
    assert "transformers" not in told.err and not told.out


def test_loaded_client_of_tied_embeddings_keeps_them_tied(tmp_path: Path) -> None:
    model = tiny_model("gpt2").eval()
    model.save_pretrained(tmp_path)
    trunk = load_trunk_model(str(tmp_path), CUTS)
    client = load_client_model(str(tmp_path), CUTS, trunk)
    assert client.lm_head.weight is client.transformer.wte.weight
    assert torch.equal(client(**padded_batch()).logits, model(**padded_batch()).logits)


def test_loading_dtype_and_attention_are_taken(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    trunk = load_trunk_model(str(tmp_path), CUTS, dtype="bfloat16", attn_implementation="eager")
    client = load_client_model(
        str(tmp_path), CUTS, trunk, dtype=torch.bfloat16, attn_implementation="eager"
    )
    for part in (client, trunk):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert part.config._attn_implementation == "eager"
    assert torch.isfinite(client(**padded_batch()).loss)


def test_model_source_is_loaded_as_the_run_config_says(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    source = ModelSource.of(
        ModelConfig(name=str(tmp_path), dtype="bfloat16", attn_implementation="eager")
    )
    assert source == ModelSource(
        name_or_path=str(tmp_path),
        dtype="bfloat16",
        attn_implementation="eager",
        task="causal-lm",
    )
    trunk = load_trunk_model(source, CUTS)
    client = load_client_model(source, CUTS, trunk)
    for part in (client, trunk, load_whole_model(source)):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert part.config._attn_implementation == "eager"


def test_setting_beside_a_model_source_is_refused() -> None:
    source = ModelSource(name_or_path="someone/tiny", dtype="bfloat16")
    with pytest.raises(SplitError, match=r"'someone/tiny'.*\{'dtype': 'float32'\}"):
        load_trunk_model(source, CUTS, dtype="float32")


def _hub(directory: Path, fetched: list[str]) -> Callable[..., Path | None]:
    """A stand-in for the function that downloads one file of a hub checkpoint."""

    def fetch(name_or_path: str, filename: str, revision: str | None) -> Path | None:
        assert (name_or_path, revision) == ("someone/tiny", "v1")
        path = directory / filename
        if not path.exists():
            return None
        fetched.append(filename)
        return path

    return fetch


def test_loading_from_the_hub_fetches_shards_with_owned_tensors_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama").eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    fetched: list[str] = []
    monkeypatch.setattr(source_module, "fetch", _hub(tmp_path, fetched))
    monkeypatch.setattr(
        source_module,
        "load_model_config",
        lambda *args, **kwargs: LlamaConfig.from_pretrained(tmp_path),
    )
    trunk = load_trunk_model("someone/tiny", CUTS, revision="v1")
    inside = {shard for n, shard in index.items() if ".layers.1." in n or ".layers.2." in n}
    outside = {
        shard for n, shard in index.items() if ".layers.1." not in n and ".layers.2." not in n
    }
    assert {name for name in fetched if name.startswith("model-")} == inside
    fetched.clear()
    client = load_client_model("someone/tiny", CUTS, trunk, revision="v1")
    assert {name for name in fetched if name.startswith("model-")} == outside
    assert outside - inside and inside - outside
    assert client.config.name_or_path == "someone/tiny"
    assert torch.equal(client(**padded_batch()).logits, model(**padded_batch()).logits)


def test_loading_base_model_checkpoint_without_prefix_is_found(tmp_path: Path) -> None:
    model = tiny_model("gpt2").eval()
    model.transformer.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "h.0.ln_1.weight" in index
    trunk = load_trunk_model(str(tmp_path), CUTS)
    client = load_client_model(str(tmp_path), CUTS, trunk)
    assert torch.equal(client(**padded_batch()).logits, model(**padded_batch()).logits)


def test_loading_a_missing_shard_names_it(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index["model.layers.0.mlp.up_proj.weight"]
    (tmp_path / shard).unlink()
    with pytest.raises(SplitError, match=shard):
        load_client_model(str(tmp_path), CUTS, IdentityTrunk())


def test_loading_a_checkpoint_that_lacks_tensors_names_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(SplitError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        load_trunk_model(str(tmp_path), CUTS)
    load_client_model(str(tmp_path), CUTS, IdentityTrunk())


def test_loading_without_weights_says_so(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(SplitError, match="safetensors"):
        load_trunk_model(str(tmp_path), CUTS)


def test_loading_without_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(SplitError, match=r"config\.json"):
        load_trunk_model(str(tmp_path), CUTS)


def test_loading_a_model_that_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=16, num_layers=2, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(SplitError, match="AutoModelForCausalLM does not load"):
        load_trunk_model(str(tmp_path), CUTS)


def test_loading_wrong_cuts_names_the_range_before_reading(
    tmp_path: Path, tensors_read: set[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(SplitError, match=r"has 4 layers.*second=9"):
        load_client_model(str(tmp_path), CutLayers(1, 9), IdentityTrunk())
    assert not tensors_read


def test_loaded_client_takes_another_trunk_later(tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    model.save_pretrained(tmp_path)
    client = load_client_model(str(tmp_path), CUTS, IdentityTrunk())
    assert not torch.equal(client(**padded_batch()).logits, model(**padded_batch()).logits)
    set_trunk(client, load_trunk_model(str(tmp_path), CUTS))
    assert torch.equal(client(**padded_batch()).logits, model(**padded_batch()).logits)


_MEASURE = """
import sys, torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
from flower_split.split import CutLayers, load_client_model
from flower_split.split.client_side.trunk_slot import IdentityTrunk
from transformers import AutoModelForCausalLM

def memory(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

baseline = memory("VmRSS:")
if sys.argv[1] == "client":
    model = load_client_model(sys.argv[2], CutLayers(2, 14), IdentityTrunk())
else:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
total = sum(float(p.sum()) for p in model.parameters())
own = sum(p.numel() * p.element_size() for p in model.parameters())
print(memory("VmHWM:") - baseline, own)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loaded_client_peak_memory_is_that_of_its_own_tensors(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=1152,
        num_hidden_layers=16,
        num_attention_heads=16,
        intermediate_size=3072,
        vocab_size=8000,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    peaks, owns = {}, {}
    for part in ("client", "whole"):
        output = subprocess.run(
            [sys.executable, "-c", _MEASURE, part, str(tmp_path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        peaks[part], owns[part] = (int(word) for word in output.split())
    assert owns["whole"] > 2**30
    assert owns["client"] < 0.35 * owns["whole"]
    assert peaks["client"] < 1.15 * owns["client"]
    assert peaks["whole"] > 2.5 * peaks["client"]
