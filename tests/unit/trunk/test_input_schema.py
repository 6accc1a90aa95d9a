"""What a trunk takes, found out from its own model; forms worked out by hand for each family."""

import pytest
import torch
import transformers
from torch import Tensor

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import BackwardCall, ContributionKey
from flower_split.split import CutLayers, split_model
from flower_split.trunk.compute.checks import InputSchema
from flower_split.trunk.compute.schema_probe import schema_of
from tests.support.tiny_configs import tiny_config
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
HIDDEN, POSITIONS, HEADS = 32, 64, 4
BATCH, SEQ = 3, 9


def schema(family: str, auto_class: str = "") -> InputSchema:
    transformers.utils.logging.set_verbosity(50)
    torch.manual_seed(0)
    if auto_class:
        model = getattr(transformers, auto_class).from_config(tiny_config(family))
    else:
        model = tiny_model(family)
    _, trunk = split_model(model, CutLayers(1, 3))
    return schema_of(trunk, trunk.hidden_size)


@pytest.fixture(scope="module")
def llama() -> InputSchema:
    return schema("llama")


def call(**tensors: Tensor) -> dict[str, Tensor]:
    return {"hidden_states": torch.zeros(BATCH, SEQ, HIDDEN), **tensors}


def refused(found: InputSchema, tensors: dict[str, Tensor], past: int | None = None) -> str:
    with pytest.raises(TrunkRefused) as caught:
        found.checked(tensors, past)
    assert caught.value.reason is RefusalReason.INVALID_REQUEST
    return str(caught.value)


def backward(grad: Tensor, num_tokens: float = 1.0, denominator: float = 1.0) -> BackwardCall:
    return BackwardCall(
        session="session",
        epoch=1,
        key=ContributionKey(
            experiment="experiment", server_round=1, attempt=0, window=0, micro_batch=0
        ),
        version=0,
        grad=grad,
        num_tokens=num_tokens,
        loss_denominator=denominator,
        last=True,
        digest=b"",
        deadline=0.0,
    )


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    "tensor",
    [
        ones(BATCH, SEQ, dtype=torch.int64),
        ones(BATCH, 1, SEQ, SEQ, dtype=torch.bool),
        ones(1, HEADS, SEQ, SEQ),
    ],
    ids=["padding", "whole", "whole-by-head"],
)
def test_masks_that_the_model_takes_pass(llama: InputSchema, tensor: Tensor) -> None:
    assert llama.checked(call(attention_mask=tensor))["attention_mask"] is tensor


@pytest.mark.parametrize(
    "tensor",
    [
        ones(1, SEQ, dtype=torch.int64),
        ones(BATCH, SEQ),
        ones(BATCH, 3, SEQ, SEQ, dtype=torch.bool),
        ones(BATCH, 1, SEQ, SEQ, dtype=torch.int64),
        ones(BATCH, 1, SEQ, SEQ, dtype=torch.bfloat16),
        ones(BATCH, 1, SEQ, SEQ - 1, dtype=torch.bool),
        2 * ones(BATCH, SEQ, dtype=torch.int64),
    ],
    ids=["rows", "float", "heads", "integers", "other-float", "positions", "values"],
)
def test_masks_that_the_model_does_not_take_are_refused(llama: InputSchema, tensor: Tensor) -> None:
    assert refused(llama, call(attention_mask=tensor)).startswith("attention_mask ")


@pytest.mark.parametrize("largest", [-1, POSITIONS])
def test_positions_that_the_model_has_not_are_refused(llama: InputSchema, largest: int) -> None:
    positions = torch.zeros(1, SEQ, dtype=torch.int64)
    llama.checked(call(position_ids=positions))
    positions[0, -1] = largest
    assert "must hold numbers from 0 to 63" in refused(llama, call(position_ids=positions))


@pytest.mark.parametrize(("seq", "past"), [(POSITIONS + 1, None), (12_000, None), (1, POSITIONS)])
def test_sequences_beyond_the_models_positions_are_refused(
    llama: InputSchema, seq: int, past: int | None
) -> None:
    text = refused(llama, {"hidden_states": torch.zeros(1, seq, HIDDEN)}, past)
    assert "max_position_embeddings" in text and "train.sequence-length" in text
    assert schema("bloom").checked({"hidden_states": torch.zeros(1, 200, HIDDEN)})


@pytest.mark.parametrize(
    "name",
    [
        "host_argument/past_key_values",
        "host_argument/self",
        "host_argument/inputs_embeds",
        "layer_argument/hidden_states",
        "layer_argument/1",
        "layer_argument/self",
        "attention_mask/full_attention",
        "labels",
        "",
    ],
)
def test_names_that_the_model_has_not_never_pass(llama: InputSchema, name: str) -> None:
    for past in (None, 0):
        text = refused(llama, call(**{name: ones(BATCH, SEQ)}), past)
        assert "takes no such tensor" in text


def test_name_of_a_peer_is_printed_short_and_plain(llama: InputSchema) -> None:
    text = refused(llama, call(**{"\n\x1b[2J" + "x" * 500: ones(1)}))
    assert text.startswith("??[2Jxxx") and text.count("x") < 90


def test_tensors_go_on_under_the_schemas_own_names(llama: InputSchema) -> None:
    name = "".join(["attention", "_mask"])  # an equal string, and another object
    found = llama.checked(call(**{name: ones(BATCH, SEQ, dtype=torch.int64)}))
    assert all(any(key is own for own in (*llama.plain, "hidden_states")) for key in found)


def test_whole_mask_beside_a_cache_covers_its_positions(llama: InputSchema) -> None:
    whole = "host_argument/attention_mask"
    llama.checked(call(**{whole: ones(BATCH, 1, SEQ, 5 + SEQ, dtype=torch.bool)}), 5)
    refused(llama, call(**{whole: ones(BATCH, 1, SEQ, 5 + SEQ, dtype=torch.bool)}), 4)
    refused(llama, call(**{whole: ones(BATCH, 1, SEQ, SEQ, dtype=torch.bool)}))


def test_masks_per_kind_of_layer_come_for_every_kind_and_alone() -> None:
    found = schema("gemma3_text")
    full, sliding = "attention_mask/full_attention", "attention_mask/sliding_attention"
    mask, nothing = ones(BATCH, 1, SEQ, SEQ, dtype=torch.bool), torch.empty(0, dtype=torch.bool)
    found.checked(call(**{full: mask, sliding: nothing}))
    assert f"{sliding} is missing" in refused(found, call(**{full: mask}))
    both = call(**{full: mask, sliding: mask, "attention_mask": ones(BATCH, SEQ).long()})
    assert "has both" in refused(found, both)


def test_bias_by_relative_position_is_taken_where_the_layers_have_one() -> None:
    found = schema("t5", "AutoModelForSeq2SeqLM")
    found.checked(call(**{"layer_argument/2": ones(1, HEADS, SEQ, SEQ)}))
    refused(found, call(**{"layer_argument/2": ones(1, HEADS, SEQ, SEQ + 1)}))
    refused(found, call(**{"layer_argument/position_bias": ones(2, 2)}))
    with pytest.raises(TrunkRefused, match="no key-value cache"):
        found.checked(call(), use_cache=True)  # an encoder


@pytest.mark.parametrize(
    ("family", "auto_class"),
    [("t5", "AutoModelForSeq2SeqLM"), ("deberta-v2", "AutoModelForSequenceClassification")],
)
def test_call_with_a_cache_is_refused_where_the_model_takes_none(
    family: str, auto_class: str
) -> None:
    assert "no key-value cache" in refused(schema(family, auto_class), call(), 0)


def test_features_of_images_have_one_row_per_position_of_the_mask() -> None:
    found = schema("qwen3_vl", "AutoModelForImageTextToText")
    mask, features = "host_argument/visual_pos_masks", "host_argument/deepstack_visual_embeds"
    where = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    where[0, 2:6] = True
    good = call(**{mask: where, f"{features}.0": ones(4, HIDDEN)})
    found.checked(good)
    refused(found, {**good, f"{features}.0": ones(3, HIDDEN)})
    assert "comes with" in refused(found, {**good, f"{features}.2": ones(4, HIDDEN)})
    assert "comes with" in refused(found, call(**{f"{features}.0": ones(0, HIDDEN)}))


@pytest.mark.parametrize(
    "grad", [ones(1, 2), ones(1, 2, HIDDEN + 1), ones(1, 2, HIDDEN, dtype=torch.int64)]
)
def test_gradient_of_another_form_is_refused(llama: InputSchema, grad: Tensor) -> None:
    llama.check_backward(backward(ones(1, 2, HIDDEN)), 3)
    with pytest.raises(TrunkRefused, match="trunk_output_grad must be"):
        llama.check_backward(backward(grad), 3)


@pytest.mark.parametrize(
    ("num_tokens", "denominator", "rule"),
    [(3.0, 1.0, "at most batch x seq = 2; slot 3"), (1.0, 0.0, "finite and above 0; slot 3")],
)
def test_weights_that_the_micro_batch_cannot_have_are_refused(
    llama: InputSchema, num_tokens: float, denominator: float, rule: str
) -> None:
    with pytest.raises(TrunkRefused, match=rule):
        llama.check_backward(backward(ones(1, 2, HIDDEN), num_tokens, denominator), 3)
