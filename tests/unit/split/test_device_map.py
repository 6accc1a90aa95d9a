"""A part over several devices: layers where they were put, numbers as on one device.

Without accelerators, a second name for the CPU, at a module without weights, makes accelerate hook
every module as it would for two GPUs.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.config import LoraPartConfig, OptimizerConfig, parse_run_config
from flower_split.errors import ConfigError, SplitError
from flower_split.lora import attach_lora
from flower_split.split import CutLayers, TrunkModel, load_client_model, load_trunk_model
from flower_split.split.loading import checkpoint as source_module
from flower_split.split.loading.device_map import DeviceMap, check_placed, resolve_device_map
from flower_split.split.structure.stack import LayerStack, find_stack
from flower_split.trunk.compute.compute import TrunkCompute
from tests.support.generation_rig import generated, lively_model
from tests.support.tiny_models import assert_same_bits, loss_and_gradients, padded_batch, tiny_model

CUTS = CutLayers(1, 3)
TRUNK, CLIENT = (1, 2), (0, 3)  # the layers of four


@pytest.fixture(autouse=True)
def _no_progress_bar() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device maps name a second device: of the trunk's place, or of the head, which no trunk has."""

    def resolve(
        device_map: DeviceMap,
        skeleton: PreTrainedModel,
        stack: LayerStack,
        indices: Sequence[int],
        *,
        beside: bool,
    ) -> object:
        places = resolve_device_map(device_map, skeleton, stack, indices, beside=beside)
        assert isinstance(places, dict)
        second = stack.layer_path(CUTS.first) if beside else next(reversed(places))
        return places | {second: torch.device("cpu:0")}

    monkeypatch.setattr(source_module, "resolve_device_map", resolve)


def hooked(trunk: nn.Module) -> int:
    return sum(hasattr(module, "_hf_hook") for module in trunk.modules())


def parts(family: str, path: Path) -> tuple[nn.Module, nn.Module, TrunkModel]:
    """The unsplit model, a client, and its trunk on two devices."""
    model = tiny_model(family)
    model.save_pretrained(path)
    trunk = load_trunk_model(str(path), CUTS, device_map={"": "cpu"}).train()
    client = load_client_model(str(path), CUTS, trunk).train()
    assert hooked(trunk) > 2
    return model, client, trunk


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bloom", "falcon", "mixtral"])
def test_trunk_on_two_devices_matches_the_whole_model_bitwise(family: str, tmp_path: Path) -> None:
    model, client, trunk = parts(family, tmp_path)
    loss, gradients = loss_and_gradients(model, padded_batch())
    split_loss, split_gradients = loss_and_gradients(client, padded_batch(), trunk)
    assert torch.equal(loss, split_loss)
    assert_same_bits(gradients, split_gradients)


@pytest.mark.usefixtures("two")
def test_trunk_on_two_devices_with_lora_matches_the_whole_model_bitwise(tmp_path: Path) -> None:
    model, client, trunk = parts("llama", tmp_path)
    lora = {part: LoraPartConfig(r=2) for part in ("bottom", "trunk", "top")}
    attach_lora(model, CUTS, lora, seed=0)
    attach_lora(client, CUTS, {part: lora[part] for part in ("bottom", "top")}, seed=0)
    attach_lora(trunk, CUTS, {"trunk": lora["trunk"]}, seed=0)
    for module in (model, client, trunk):
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.1)
    loss, gradients = loss_and_gradients(model, padded_batch())
    split_loss, split_gradients = loss_and_gradients(client, padded_batch(), trunk)
    assert torch.equal(loss, split_loss)
    assert_same_bits(gradients, split_gradients)
    assert len(split_gradients) == 4 * 7 * 2


@pytest.mark.usefixtures("two")
def test_trunk_on_two_devices_recomputes_and_steps_as_on_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    smashed = torch.randn(2, 5, 32, generator=generator)
    output_grad = torch.randn(2, 5, 32, generator=generator)

    def result(device_map: dict[str, str] | None, recompute: bool) -> list[Tensor]:
        trunk = load_trunk_model(str(tmp_path), CUTS, device_map=device_map)
        assert bool(hooked(trunk)) == (device_map is not None)
        compute = TrunkCompute(trunk, OptimizerConfig(max_grad_norm=0.5), seed=0)
        output, activation = compute.forward_train({"hidden_states": smashed}, seed_of="one")
        if recompute:
            activation.output = None
        smashed_grad, gradients = compute.backward(activation, output_grad)
        compute.step(gradients)
        return [output, smashed_grad, *(p.detach() for p in compute.parameters)]

    expected = result(None, recompute=False)
    for recompute in (False, True):
        found = result({"": "cpu"}, recompute)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.usefixtures("two")
def test_generation_with_the_trunk_on_two_devices_equals_unsplit(tmp_path: Path) -> None:
    model = lively_model("gemma3_text")
    model.save_pretrained(tmp_path)
    trunk = load_trunk_model(str(tmp_path), CUTS, device_map={"": "cpu"})
    client = load_client_model(str(tmp_path), CUTS, trunk)
    assert hooked(trunk) > 2
    assert torch.equal(generated(client, "beam"), generated(model, "beam"))


@pytest.mark.usefixtures("two")
def test_span_of_a_trunk_on_two_devices_shares_its_weights(tmp_path: Path) -> None:
    model, _, trunk = parts("llama", tmp_path)
    span = trunk.span(CutLayers(2, 3))
    own = dict(trunk.named_parameters())
    assert all(parameter is own[name] for name, parameter in span.named_parameters())
    client = load_client_model(str(tmp_path), CutLayers(2, 3), span)
    batch = padded_batch()
    assert torch.equal(client(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("name", ["auto", "balanced", "sequential"])
def test_a_named_map_without_accelerators_is_the_cpu(name: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there are accelerators")
    model = tiny_model("llama").eval()
    model.save_pretrained(tmp_path)
    trunk = load_trunk_model(str(tmp_path), CUTS, device_map=name)
    client = load_client_model(str(tmp_path), CUTS, trunk)
    assert torch.equal(client(**padded_batch()).logits, model(**padded_batch()).logits)


def test_map_places_the_trunk_alone_and_the_rest_with_its_first_layer() -> None:
    model = tiny_model("llama")
    asked = {"": "mps:0", "model.layers.2": "mps:1", "lm_head": "mps:1", "model.layers.3": "mps:1"}
    places = resolve_device_map(asked, model, find_stack(model), TRUNK)
    second = {name for name, device in places.items() if device == torch.device("mps:1")}
    assert second == {"model.layers.2"}
    assert places["model.layers.1"] == places["model.embed_tokens"] == torch.device("mps:0")
    assert places["model.layers.3"] == places["lm_head"] == torch.device("mps:0")
    assert not {"", "model", "model.layers"} & places.keys()  # such a name would move all below it


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model.layers.1": "cpu"}, r"model\.layers\.2.*no place"),
        ({"model.layers": "cpu", "model.layers.2.mlp": "cpu"}, r"model\.layers\.2\.mlp.*whole"),
        ({"": "disk"}, "disk.*no device to compute on"),
        ({"": "meta"}, "meta"),
        ({"": "cuda:97"}, "cuda:97.*CUDA devices here"),
        ({"model.layers.1": "cpu", "model.layers.2": "mps"}, "on the CPU and others"),
        ("anywhere", "must be one of auto, balanced"),
    ],
    ids=str,
)
def test_a_map_that_cannot_be_followed_is_refused(
    device_map: str | dict[str, str], message: str, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(SplitError, match=message):
        load_trunk_model(str(tmp_path), CUTS, device_map=device_map)


def test_device_beside_a_map_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(SplitError, match="device must be left out"):
        load_trunk_model(str(tmp_path), CUTS, device="cpu", device_map="auto")


def test_a_layer_without_room_on_the_accelerators_is_refused() -> None:
    model = tiny_model("llama")
    stack = find_stack(model)
    model.hf_device_map = {"model.embed_tokens": "cpu", "model.layers.1": 0, "model.layers.2": 1}
    check_placed(model, stack, TRUNK)
    with pytest.raises(SplitError, match=r"no room for model\.embed_tokens"):
        check_placed(model, stack, CLIENT, beside=True)
    for name, place in (("model.layers.2", "disk"), ("model.layers", "cpu")):
        model.hf_device_map = {"lm_head": 0, "model.layers.1": 0, name: place}
        with pytest.raises(SplitError, match="no room for model.layers"):
            check_placed(model, stack, TRUNK)
    model.hf_device_map = {"model": "cpu"}
    check_placed(model, stack, TRUNK)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bloom", "falcon", "mixtral"])
def test_client_on_two_devices_matches_the_whole_model_bitwise(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    trunk = load_trunk_model(str(tmp_path), CUTS).train()
    client = load_client_model(str(tmp_path), CUTS, trunk, device_map={"": "cpu"}).train()
    assert hooked(client) > 2
    lora = {part: LoraPartConfig(r=2) for part in ("bottom", "trunk", "top")}
    attach_lora(model, CUTS, lora, seed=0)
    attach_lora(client, CUTS, {part: lora[part] for part in ("bottom", "top")}, seed=0)
    attach_lora(trunk, CUTS, {"trunk": lora["trunk"]}, seed=0)
    for module in (model, client, trunk):
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.1)
    loss, gradients = loss_and_gradients(model, padded_batch())
    split_loss, split_gradients = loss_and_gradients(client, padded_batch(), trunk)
    assert torch.equal(loss, split_loss)
    assert_same_bits(gradients, split_gradients)


@pytest.mark.usefixtures("two")
def test_generation_with_the_client_on_two_devices_equals_unsplit(tmp_path: Path) -> None:
    model = lively_model("gemma3_text")
    model.save_pretrained(tmp_path)
    trunk = load_trunk_model(str(tmp_path), CUTS)
    client = load_client_model(str(tmp_path), CUTS, trunk, device_map={"": "cpu"})
    assert torch.equal(generated(client, "beam"), generated(model, "beam"))


def test_map_of_a_client_places_its_layers_and_what_is_beside_them() -> None:
    model = tiny_model("llama")
    asked = {"": "mps:0", "model.layers.3": "mps:1", "lm_head": "mps:1", "model.layers.1": "mps:2"}
    places = resolve_device_map(asked, model, find_stack(model), CLIENT, beside=True)
    second = {name for name, device in places.items() if device == torch.device("mps:1")}
    assert second == {"model.layers.3", "lm_head"}
    assert places["model.layers.0"] == places["model.embed_tokens"] == torch.device("mps:0")


def test_map_that_parts_a_shared_weight_is_refused(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    trunk = load_trunk_model(str(tmp_path), CUTS)
    with pytest.raises(SplitError, match=r"lm_head\.weight on cpu:0.*they are one weight"):
        load_client_model(str(tmp_path), CUTS, trunk, device_map={"": "cpu", "lm_head": "cpu:0"})


@pytest.mark.parametrize("part", ["train", "trunk"])
def test_run_config_takes_a_named_map_and_no_device_beside_it(part: str) -> None:
    key, beside = f"{part}.device-map", f"{part}.device"
    assert getattr(parse_run_config({key: "balanced"}), part).device_map == "balanced"
    with pytest.raises(ConfigError, match=rf"{part}\.device-map must be one of"):
        parse_run_config({key: "cuda:1"})
    with pytest.raises(ConfigError, match=rf"{part}\.device must stay"):
        parse_run_config({key: "auto", beside: "cuda:0"})
