"""Split equals unsplit on GPUs: attention kernels, half precision, quantised bases, several GPUs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from flower_split.config import LoraPartConfig, OptimizerConfig
from flower_split.errors import SplitError
from flower_split.lora import adapter_state, attach_lora
from flower_split.split import CutLayers, load_client_model, load_trunk_model, load_whole_model
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import Reduction, SlotGradient
from tests.acceptance.federation import (
    SGD,
    Whole,
    federation,
    make_batch,
    make_config,
    perturbed,
    write_checkpoint,
)
from tests.support.checkpoints import write_fp8
from tests.support.tiny_models import VOCAB_SIZE, loss_and_gradients, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

CUTS = CutLayers(2, 10)
NUM_LAYERS = 12
LORA = {part: LoraPartConfig(r=8) for part in ("bottom", "trunk", "top")}
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "num_hidden_layers": NUM_LAYERS,
}
OWN = {"gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)}}


@pytest.fixture(autouse=True)
def _no_progress_bar() -> None:
    transformers.utils.logging.disable_progress_bar()


def checkpoint(path: Path, family: str = "llama") -> str:
    """Layers of 256, large enough for the GPU's matrix units."""
    tiny_model(family, **WIDE, **OWN.get(family, {})).save_pretrained(path)
    return str(path)


def batch() -> dict[str, Tensor]:
    """Four rows of 96 tokens, one left-padded, one right-padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB_SIZE, (4, 96), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :30], mask[1, -20:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    made = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}
    return {name: tensor.cuda() for name, tensor in made.items()}


def with_lora(model: nn.Module, *parts: str) -> nn.Module:
    """LoRA with B away from zero, in training mode."""
    attach_lora(model, CUTS, {part: LORA[part] for part in parts}, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.01)
    return model.train()


def parts_of(path: str, placing: Mapping[str, object], **options: object) -> tuple[nn.Module, ...]:
    """The unsplit model and the client on the first GPU, and the trunk where ``placing`` says."""
    whole = load_whole_model(path, device="cuda", **options)
    trunk = load_trunk_model(path, CUTS, **placing, **options)
    client = load_client_model(path, CUTS, trunk, device="cuda", **options)
    with_lora(trunk, "trunk")
    return with_lora(whole, *LORA), with_lora(client, "bottom", "top"), trunk


def largest_difference(whole: nn.Module, client: nn.Module, trunk: nn.Module) -> float:
    """The largest ‖split − unsplit‖ / ‖unsplit‖ over the loss and every gradient."""
    loss, gradients = loss_and_gradients(whole, batch())
    split_loss, split_gradients = loss_and_gradients(client, batch(), trunk)
    assert gradients.keys() == split_gradients.keys() and len(gradients) == NUM_LAYERS * 7 * 2
    pairs = [(loss, split_loss)]
    for name, gradient in gradients.items():
        other = split_gradients[name]
        assert gradient is not None and other is not None, name
        assert gradient.ne(0).any(), name
        pairs.append((gradient, other))
    differences = [float((other.to(one.device) - one).norm() / one.norm()) for one, other in pairs]
    assert not any(math.isnan(difference) for difference in differences)
    return max(differences)


def report(capsys: pytest.CaptureFixture[str], what: str, difference: float) -> None:
    with capsys.disabled():
        print(f"\n  split against unsplit, {what}: largest relative difference {difference:.1e}")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_gpu_dtype_and_attention_equal_unsplit(
    family: str, dtype: str, attention: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path, family)
    options = {"dtype": dtype, "attn_implementation": attention}
    difference = largest_difference(*parts_of(path, {"device": "cuda"}, **options))
    report(capsys, f"{family}, {dtype}, {attention}", difference)
    assert difference < 1e-2


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_gpu_other_attention_equals_unsplit_or_is_refused(
    attention: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path)
    options = {"dtype": "bfloat16", "attn_implementation": attention}
    try:
        parts = parts_of(path, {"device": "cuda"}, **options)
    except SplitError as refused:
        with capsys.disabled():
            print(f"\n  {attention} is refused: {refused}")
        return
    difference = largest_difference(*parts)
    report(capsys, f"llama, bfloat16, {attention}", difference)
    assert difference < 1e-2


@bitsandbytes
@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gpu_quantised_base_equals_unsplit(
    family: str, dtype: str, quantization: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path, family)
    plain = load_trunk_model(path, CUTS, dtype=dtype, device="cuda")
    options = {"dtype": dtype, "quantization": quantization}
    whole, client, trunk = parts_of(path, {"device": "cuda"}, **options)
    bytes_of = [
        sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)
        for model in (plain, trunk)
    ]
    assert bytes_of[1] < {"bnb-4bit": 0.3, "bnb-8bit": 0.55}[quantization] * bytes_of[0]
    difference = largest_difference(whole, client, trunk)
    report(capsys, f"{family}, {dtype}, {quantization}", difference)
    assert difference < 1e-2


def test_gpu_fp8_checkpoint_is_dequantised_and_equals_unsplit(tmp_path: Path) -> None:
    write_fp8(tmp_path, **WIDE)
    options = {"dtype": "bfloat16", "quantization": "dequantize"}
    assert largest_difference(*parts_of(str(tmp_path), {"device": "cuda"}, **options)) < 1e-2


def test_gpu_fp8_checkpoint_as_it_is_trains_or_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fp8(tmp_path, **WIDE)
    try:
        parts = parts_of(str(tmp_path), {"device": "cuda"}, dtype="bfloat16")
    except SplitError as refused:
        with capsys.disabled():
            print(f"\n  fp8 as it is, is refused: {refused}")
        return
    assert largest_difference(*parts) < 1e-2


MAPS = [
    pytest.param("auto", id="auto"),
    pytest.param("balanced", id="balanced"),
    pytest.param({"": 1, "model.layers.2": "cuda:0"}, id="by-layer"),
]


def devices_of(trunk: nn.Module) -> list[int | None]:
    """The device of each trunk layer, of which every parameter is on one."""
    layers = trunk.get_submodule("model.layers")
    places = [
        {p.device.index for p in layers[i].parameters()} for i in range(CUTS.first, CUTS.second)
    ]
    assert all(len(place) == 1 for place in places)  # LoRA as well
    return [place.pop() for place in places]


@two_gpus
@pytest.mark.parametrize("device_map", MAPS)
@pytest.mark.parametrize("quantization", [None, pytest.param("bnb-4bit", marks=bitsandbytes)])
def test_gpu_trunk_over_two_gpus_equals_unsplit(
    device_map: object, quantization: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path)
    options = {"dtype": "bfloat16", "quantization": quantization}
    whole, client, trunk = parts_of(path, {"device_map": device_map}, **options)
    places = devices_of(trunk)
    assert set(places) == {0, 1} and places == sorted(places)
    difference = largest_difference(whole, client, trunk)
    report(capsys, f"two GPUs, {device_map}, {quantization or 'plain'}", difference)
    assert difference < 1e-2


@two_gpus
@pytest.mark.parametrize("device_map", ["balanced", {"": 0, "model.layers.11": 1, "lm_head": 1}])
def test_gpu_client_over_two_gpus_equals_unsplit(
    device_map: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path)
    options = {"dtype": "bfloat16"}
    whole, _, trunk = parts_of(path, {"device": "cuda:0"}, **options)
    client = load_client_model(path, CUTS, trunk, device_map=device_map, **options)
    with_lora(client, "bottom", "top")
    assert {parameter.device.index for parameter in client.parameters()} == {0, 1}
    difference = largest_difference(whole, client, trunk)
    report(capsys, f"a client over two GPUs, {device_map}", difference)
    assert difference < 1e-2


@two_gpus
def test_gpu_trunk_over_two_gpus_answers_on_the_device_it_was_asked_on(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    trunk = load_trunk_model(path, CUTS, device_map="balanced")
    single = load_trunk_model(path, CUTS, device="cuda:0")
    hidden = torch.randn(2, 7, 256, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    expected = single(hidden.to("cuda:0"), mask.to("cuda:0")).cpu()
    for place in ("cuda:0", "cuda:1", "cpu"):
        leaf = hidden.to(place).requires_grad_()
        output = trunk(leaf, mask.to(place))
        (gradient,) = torch.autograd.grad(output.sum(), leaf)
        assert output.device == leaf.device == gradient.device
        torch.testing.assert_close(output.cpu(), expected)


@two_gpus
def test_gpu_trunk_over_two_gpus_recomputes_clips_and_steps_as_on_one(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    generator = torch.Generator().manual_seed(3)
    smashed, output_grad = torch.randn(2, 2, 5, 256, generator=generator).unbind()
    lora = {"trunk": replace(LORA["trunk"], dropout=0.3)}

    def result(recompute: bool, **placing: object) -> list[Tensor]:
        trunk = load_trunk_model(path, CUTS, **placing)
        attach_lora(trunk, CUTS, lora, seed=0)
        compute = TrunkCompute(trunk, OptimizerConfig(max_grad_norm=0.1), seed=0)
        found = []
        for step in range(3):
            output, activation = compute.forward_train(
                {"hidden_states": smashed}, seed_of=str(step)
            )
            if recompute:
                activation.output = None
            smashed_grad, gradients = compute.backward(activation, output_grad)
            slot = SlotGradient()
            slot.add(0, gradients, num_tokens=8.0, loss_denominator=8.0)
            compute.step(Reduction(max_client_norm=0.05)({0: slot}))
            found += [output, smashed_grad]
        return [tensor.cpu() for tensor in (*found, *compute.state_tensors().values())]

    kept, recomputed = (result(again, device_map="balanced") for again in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    again = result(False, device_map="balanced")
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    # Where dropout draws on another GPU it draws other numbers; without it the two agree.
    lora["trunk"] = LORA["trunk"]
    on_one, on_two = result(False, device="cuda:0"), result(False, device_map="balanced")
    for one, two in zip(on_one, on_two, strict=True):
        torch.testing.assert_close(one, two)


@two_gpus
def test_gpu_generation_over_two_gpus_equals_unsplit(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    whole = load_whole_model(path, device="cuda")
    trunk = load_trunk_model(path, CUTS, device_map="balanced")
    client = load_client_model(path, CUTS, trunk, device="cuda")
    inputs = {name: tensor for name, tensor in batch().items() if name != "labels"}
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "num_beams": 2, "pad_token_id": 0}
    expected = whole.generate(**inputs, **options)
    assert torch.equal(client.generate(**inputs, **options), expected)
    with torch.no_grad():
        held = client(
            **inputs, use_cache=True
        ).past_key_values  # while it lives, so does the trunk's
    (kept,) = trunk._caches.values()
    layers = kept.cache.layers[CUTS.first : CUTS.second]
    assert [layer.keys.device.index for layer in layers] == devices_of(trunk)
    assert held.get_seq_length() == 96


@two_gpus
def test_gpu_federated_step_with_the_trunk_over_two_gpus_equals_one_central_step(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path)
    plain = make_config(tmp_path)
    plain = replace(plain, model=replace(plain.model, first_cut=1, second_cut=5))
    config = replace(plain, trunk=replace(plain.trunk, device_map="balanced"))
    batches = {0: make_batch(1, [3], seed=0), 1: make_batch(4, [12, 12, 2, 7], seed=2)}
    with federation(config) as run:
        places = {p.device for p in run.engine.compute.trunk.parameters()}
        assert places == {torch.device("cuda", 0), torch.device("cuda", 1)}
        start = perturbed(run.engine.adapter(), 1)
        run.load_trunk(start)
        client = perturbed(adapter_state(run.client_model(0)), 7)
        run.train(client, {slot: [one] for slot, one in batches.items()})
        found = run.engine.adapter()
    reference = Whole(plain)
    reference.load(client, start)
    central = reference.sgd_step(list(batches.values()), SGD.learning_rate)
    for name, tensor in found.items():
        assert not torch.equal(tensor, start[name])
        torch.testing.assert_close(tensor, central[name], rtol=1e-3, atol=1e-5)
