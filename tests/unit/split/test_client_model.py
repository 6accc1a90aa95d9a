"""The client is an ordinary PreTrainedModel; what does not fit is refused."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from flower_split.errors import SplitError
from flower_split.split import CutLayers, set_trunk, split_model
from tests.support.generation_rig import going_on
from tests.support.tiny_models import assert_same_bits, loss_and_gradients, padded_batch, tiny_model

CUTS = CutLayers(1, 3)
# PEFT itself reads a property that transformers has deprecated.
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_parts_names_are_the_unsplit_ones_and_disjoint() -> None:
    model = tiny_model("llama")
    client, trunk = split_model(model, CUTS)
    assert type(client) is type(model) and isinstance(client, PreTrainedModel)
    mine, theirs, whole = (set(m.state_dict()) for m in (client, trunk, model))
    assert not mine & theirs
    assert mine | theirs == whole
    assert theirs == {
        name for name in whole if name.startswith(("model.layers.1", "model.layers.2"))
    }


def test_trunk_has_no_parameter_outside_its_layers() -> None:
    model = tiny_model("llama")
    model.model.scale = nn.Parameter(torch.ones(32))
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: output * model.model.scale
    )
    client, trunk = split_model(model, CUTS)
    assert "model.scale" in dict(client.named_parameters())
    assert all(trunk.stack.index_of(name) in (1, 2) for name, _ in trunk.named_parameters())
    assert all(trunk.stack.index_of(name) in (1, 2) for name in trunk.state_dict())


def test_split_model_leaves_the_given_model_alone() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    logits = model(**padded_batch()).logits
    client, trunk = split_model(model, CUTS)
    for part in (client, trunk):
        for parameter in part.parameters():
            parameter.data.zero_()
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(**padded_batch()).logits, logits)


def test_split_model_leaves_the_random_state_alone() -> None:
    model = tiny_model("gpt2")
    model.transformer.wte.register_forward_hook(lambda *call: torch.rand(1) and None)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    split_model(model, CUTS)
    assert torch.equal(torch.rand(4), expected)


def test_client_mode_is_passed_on_to_the_trunk() -> None:
    client, trunk = split_model(tiny_model("llama"), CUTS)
    assert client.training and trunk.training
    client.eval()
    assert not any(module.training for module in trunk.modules())
    client.train()
    assert all(module.training for module in trunk.modules())


def test_client_of_tied_embeddings_keeps_them_tied() -> None:
    client, _ = split_model(tiny_model("gpt2"), CUTS)
    assert client.lm_head.weight is client.transformer.wte.weight


def test_client_refuses_save_pretrained_which_would_load_with_fresh_layers(tmp_path: Path) -> None:
    client, _ = split_model(tiny_model("llama"), CUTS)
    with pytest.raises(SplitError, match="holds only the bottom and the top.*flower-split export"):
        client.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@peft_warns
def test_peft_on_the_client_targets_its_own_layers_only() -> None:
    client, _ = split_model(tiny_model("llama"), CUTS)
    wrapped = get_peft_model(client, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped(**padded_batch()).loss.backward()
    names = {n for n, p in wrapped.named_parameters() if p.requires_grad and "lora_B" in n}
    assert len(names) == 2
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "opt", "bloom"])
def test_generate_matches_the_unsplit_model_token_for_token(family: str) -> None:
    model = tiny_model(family).eval()
    client, _ = split_model(model, CUTS)
    batch = {k: v for k, v in padded_batch().items() if k != "labels"}
    batch["attention_mask"][1] = 1
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**batch, **options)
    assert expected.shape == (3, 17)
    assert torch.equal(client.generate(**batch, **options), expected)


def test_client_with_a_filled_cache_is_refused() -> None:
    client, _ = split_model(tiny_model("llama").eval(), CUTS)
    ids = padded_batch()["input_ids"]
    cache = client(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(SplitError, match="use_cache=False"):
        client(input_ids=ids[:, :1], **going_on(client, cache))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_with_a_cache_of_fixed_length_is_refused(family: str) -> None:
    client, _ = split_model(tiny_model(family).eval(), CUTS)
    batch = {k: v for k, v in padded_batch().items() if k != "labels"}
    with pytest.raises(SplitError, match='StaticCache.*cache_implementation="dynamic"'):
        client.generate(**batch, max_new_tokens=4, cache_implementation="static")


def test_client_with_a_whole_mask_matches_unsplit() -> None:
    model = tiny_model("llama")
    client, trunk = split_model(model, CUTS)
    batch = padded_batch()
    blocks = torch.zeros(3, 1, 9, 9, dtype=torch.bool)
    blocks[:, :, :4, :4] = blocks[:, :, 4:, 4:] = True  # two texts that see themselves alone
    batch["attention_mask"] = blocks & torch.ones(9, 9, dtype=torch.bool).tril()
    expected, gradients = loss_and_gradients(model, batch)
    loss, split_gradients = loss_and_gradients(client, batch, trunk)
    assert torch.equal(loss, expected)
    assert_same_bits(gradients, split_gradients)
    assert not torch.equal(loss, client(**padded_batch()).loss)


def test_client_with_a_mask_of_three_dimensions_is_refused() -> None:
    client, _ = split_model(tiny_model("gemma3_text"), CUTS)
    masks = dict.fromkeys(("full_attention", "sliding_attention"), torch.zeros(1, 4, 4))
    with pytest.raises(SplitError, match=r"shape \[batch, seq\]"):
        client(input_ids=torch.ones(1, 4).long(), attention_mask=masks)


def test_client_with_an_argument_the_trunk_lacks_is_refused() -> None:
    client, _ = split_model(tiny_model("gpt2", add_cross_attention=True), CUTS)
    ids = torch.ones(1, 4).long()
    with pytest.raises(SplitError, match="encoder_hidden_states"):
        client(input_ids=ids, encoder_hidden_states=torch.zeros(1, 2, 32))


def test_client_with_an_argument_that_its_layers_do_not_see_matches_unsplit() -> None:
    model = tiny_model("gpt2")
    client, trunk = split_model(model, CUTS)
    batch = padded_batch()
    batch["token_type_ids"] = batch["input_ids"] % 5  # embedded on the client
    expected, gradients = loss_and_gradients(model, batch)
    loss, split_gradients = loss_and_gradients(client, batch, trunk)
    assert torch.equal(loss, expected)
    assert_same_bits(gradients, split_gradients)


@pytest.mark.parametrize(
    ("first", "second"), [(-1, 2), (2, 2), (3, 1)], ids=["negative", "empty", "reversed"]
)
def test_cut_layers_out_of_order_are_refused(first: int, second: int) -> None:
    with pytest.raises(SplitError, match=f"first={first} and second={second}"):
        CutLayers(first, second)


def test_split_model_cut_beyond_the_last_layer_names_the_range() -> None:
    with pytest.raises(SplitError, match=r"has 4 layers.*<= 4; they are first=1 and second=5"):
        split_model(tiny_model("llama"), CutLayers(1, 5))


def test_split_model_of_a_client_is_refused() -> None:
    client, _ = split_model(tiny_model("llama"), CUTS)
    with pytest.raises(SplitError, match="already split"):
        split_model(client, CUTS)


@peft_warns
def test_split_model_of_a_peft_model_is_refused() -> None:
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(SplitError, match="get_base_model"):
        split_model(wrapped, CUTS)


def test_set_trunk_on_an_unsplit_model_is_refused() -> None:
    with pytest.raises(SplitError, match="not a client model"):
        set_trunk(tiny_model("llama"), nn.Identity())


@pytest.mark.parametrize(
    ("family", "setting"),
    [("opt", {"layerdrop": 0.1}), ("mixtral", {"output_router_logits": True})],
)
def test_split_model_setting_that_couples_layers_is_refused(
    family: str, setting: dict[str, object]
) -> None:
    with pytest.raises(SplitError, match=next(iter(setting))):
        split_model(tiny_model(family, **setting), CUTS)


def test_client_call_that_asks_for_all_router_logits_is_refused() -> None:
    client, _ = split_model(tiny_model("mixtral"), CUTS)
    with pytest.raises(SplitError, match="output_router_logits"):
        client(**padded_batch(), output_router_logits=True)


def test_split_model_of_one_layer_run_again_and_again_says_so() -> None:
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        vocab_size=64,
        embedding_size=8,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=4,
    )
    with pytest.raises(SplitError, match="one layer's weights 4 times"):
        split_model(AlbertForMaskedLM(config), CUTS)


def test_split_model_weight_shared_across_the_cut_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(SplitError, match="shares one weight"):
        split_model(model, CUTS)


def test_split_model_hidden_states_changed_between_layers_is_refused() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[2]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 2, *args[1:]), kwargs), with_kwargs=True
    )
    with pytest.raises(SplitError, match="between layers 1 and 2"):
        split_model(model, CUTS)


def test_split_model_layer_input_that_depends_on_the_tokens_is_refused() -> None:
    model = tiny_model("llama")

    class PerToken(type(model.model)):
        def forward(self, input_ids: torch.Tensor | None = None, **kwargs: object) -> object:
            scale = 1.0 if input_ids is None else input_ids.float().mean()
            layer = self.layers[1]
            original = layer.forward
            layer.forward = lambda hidden_states, **k: original(hidden_states * scale, **k)
            try:
                return super().forward(input_ids=input_ids, **kwargs)
            finally:
                layer.forward = original

    model.model.__class__ = PerToken
    with pytest.raises(SplitError, match="computes something else"):
        split_model(model, CUTS)


@pytest.mark.parametrize("training", [False, True])
def test_parts_take_the_training_mode_of_the_model(training: bool) -> None:
    model = tiny_model("gpt2").train(training)
    client, trunk = split_model(model, CUTS)
    assert {module.training for part in (client, trunk) for module in part.modules()} == {training}


def test_encoder_decoder_with_dropout_split_in_evaluation_generates_as_the_unsplit_model() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=4,
        num_heads=2,
        dropout_rate=0.5,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.arange(2, 14).view(2, 6), "max_new_tokens": 8, "num_beams": 2}
    expected = model.generate(**inputs)
    client, _ = split_model(model, CUTS)
    assert torch.equal(client.generate(**inputs), expected)
