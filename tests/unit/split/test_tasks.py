"""Other kinds of model than causal language models: heads on encoders, vision, encoder-decoder."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from flower_split.errors import SplitError
from flower_split.split import (
    CutLayers,
    TrunkModel,
    load_client_model,
    load_trunk_model,
    set_trunk,
    split_model,
)
from flower_split.split.client_side.trunk_slot import IdentityTrunk
from tests.support.task_batches import image_text_to_text
from tests.support.tiny_configs import tiny_config
from tests.support.tiny_models import assert_same_bits, padded_batch, tiny_model
from tests.unit.split.coverage import TASKS

pytestmark = pytest.mark.filterwarnings("ignore")
CUTS = CutLayers(1, 3)
LABELS = torch.tensor([0, 1, 1])
ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "electra", "deberta-v2")
DECODERS = ("llama", "gpt2", "qwen2")


@pytest.fixture(autouse=True)
def _silent() -> None:
    transformers.utils.logging.set_verbosity(50)


def _model(auto_class: type, family: str, **changes: object) -> PreTrainedModel:
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return auto_class.from_config(config).train()


def _text(**labels: Tensor) -> dict[str, Tensor]:
    batch = padded_batch()
    return {name: batch[name] for name in ("input_ids", "attention_mask")} | labels


def _assert_split_matches(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    client, trunk = split_model(model, CUTS)
    assert type(client) is type(model)
    _assert_parts_match(model, client, trunk, batch)


def _assert_parts_match(
    model: PreTrainedModel, client: PreTrainedModel, trunk: TrunkModel, batch: dict[str, Tensor]
) -> None:
    losses = []
    for module in (model, client):
        torch.manual_seed(5)
        losses.append(module(**batch).loss)
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    split = {n: p.grad for part in (client, trunk) for n, p in part.named_parameters()}
    whole = {n: p.grad for n, p in model.named_parameters()}
    unused = {name for name, gradient in whole.items() if gradient is None}
    assert all(split[name] is None for name in unused)
    assert_same_bits(
        {n: g for n, g in whole.items() if n not in unused},
        {n: g for n, g in split.items() if n not in unused},
    )


@pytest.mark.parametrize("family", (*ENCODERS, *DECODERS))
def test_sequence_classification_split_matches_unsplit(family: str) -> None:
    _assert_split_matches(_model(AutoModelForSequenceClassification, family), _text(labels=LABELS))


@pytest.mark.parametrize("family", (*ENCODERS, *DECODERS))
def test_token_classification_split_matches_unsplit(family: str) -> None:
    labels = padded_batch()["input_ids"] % 2
    _assert_split_matches(_model(AutoModelForTokenClassification, family), _text(labels=labels))


@pytest.mark.parametrize("family", (*ENCODERS, *DECODERS))
def test_question_answering_split_matches_unsplit(family: str) -> None:
    batch = _text(start_positions=LABELS + 3, end_positions=LABELS + 4)
    _assert_split_matches(_model(AutoModelForQuestionAnswering, family), batch)


@pytest.mark.parametrize("family", ENCODERS)
def test_masked_lm_split_matches_unsplit(family: str) -> None:
    labels = padded_batch()["labels"]
    _assert_split_matches(_model(AutoModelForMaskedLM, family), _text(labels=labels))


@pytest.mark.parametrize("family", ["vit", "dinov2", "beit"])
def test_image_classification_split_matches_unsplit(family: str) -> None:
    model = _model(AutoModelForImageClassification, family, image_size=16, patch_size=4)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    _assert_split_matches(model, {"pixel_values": pixels, "labels": LABELS})


@pytest.mark.parametrize("family", ["bart", "marian", "pegasus", "t5", "mt5"])
def test_encoder_decoder_is_cut_in_its_encoder_and_matches_unsplit(family: str) -> None:
    model = _model(AutoModelForSeq2SeqLM, family)
    _, trunk = split_model(model, CUTS)
    assert "encoder." in trunk.stack.path
    _assert_split_matches(model, _text(labels=padded_batch()["input_ids"]))


def _with_images(family: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model = _model(AutoModelForImageTextToText, family)
    kind, batch = next(image_text_to_text(model))
    assert kind == "with images"
    return model, batch


@pytest.mark.parametrize(
    "family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "glm4v"]
)
def test_vision_language_model_with_images_split_matches_unsplit(family: str) -> None:
    model, batch = _with_images(family)
    client, trunk = split_model(model, CUTS)
    assert all("language_model" in name for name, _ in trunk.named_parameters())
    assert any("vis" in name for name, _ in client.named_parameters())
    _assert_parts_match(model, client, trunk, batch)


@pytest.mark.parametrize("cuts", [(0, 1), (0, 2), (0, 4), (1, 2), (1, 4), (2, 4), (3, 4)])
def test_features_of_images_between_layers_split_matches_unsplit(cuts: tuple[int, int]) -> None:
    model, batch = _with_images("qwen3_vl")
    assert len(model.config.vision_config.deepstack_visual_indexes) == 3  # after layers 0, 1, 2
    client, trunk = split_model(model, CutLayers(*cuts))
    _assert_parts_match(model, client, trunk, batch)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_generation_after_images_matches_unsplit_token_for_token(family: str) -> None:
    model, batch = _with_images(family)
    model.eval()
    client, trunk = split_model(model, CUTS)
    del batch["labels"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**batch, **options)
    positions = []
    trunk.register_forward_pre_hook(lambda module, args: positions.append(args[0].shape[1]))
    assert torch.equal(client.generate(**batch, **options), expected)
    assert positions == [batch["input_ids"].shape[1], 1, 1, 1, 1, 1]


class _PlainTrunk(torch.nn.Module):
    """A trunk that takes the three tensors of every trunk and nothing else."""

    def __init__(self, trunk: TrunkModel) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        return self.trunk(hidden_states, attention_mask, position_ids)


def test_features_between_layers_of_a_trunk_that_takes_none_are_refused() -> None:
    model, batch = _with_images("qwen3_vl")
    client, trunk = split_model(model, CUTS)
    set_trunk(client, _PlainTrunk(trunk))
    with pytest.raises(SplitError, match="host_arguments"):
        client(**batch)
    client, trunk = split_model(model, CutLayers(3, 4))  # behind all of the features
    set_trunk(client, _PlainTrunk(trunk))
    _assert_parts_match(model, client, trunk, batch)


def test_bias_of_all_layers_with_a_trunk_that_takes_none_is_refused() -> None:
    client, trunk = split_model(_model(AutoModelForSeq2SeqLM, "t5"), CUTS)
    set_trunk(client, _PlainTrunk(trunk))
    with pytest.raises(SplitError, match="layer_arguments"):
        client(**_text(labels=padded_batch()["input_ids"]))


@pytest.mark.parametrize("cuts", [(0, 1), (0, 3)])
def test_bias_that_the_trunk_would_make_for_the_top_is_refused(cuts: tuple[int, int]) -> None:
    model = _model(AutoModelForSeq2SeqLM, "t5")
    with pytest.raises(SplitError, match="first cut 1 or more"):
        split_model(model, CutLayers(*cuts))


@pytest.mark.parametrize("cuts", [(0, 4), (1, 2), (2, 4), (3, 4)])
def test_bias_of_all_layers_with_odd_cuts_matches_unsplit(cuts: tuple[int, int]) -> None:
    model = _model(AutoModelForSeq2SeqLM, "t5")
    client, trunk = split_model(model, CutLayers(*cuts))
    _assert_parts_match(model, client, trunk, _text(labels=padded_batch()["input_ids"]))


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava"])
def test_vision_language_model_with_text_alone_split_matches_unsplit(family: str) -> None:
    model = _model(AutoModelForImageTextToText, family)
    _assert_split_matches(model, padded_batch())


def test_images_that_see_themselves_whole_split_matches_unsplit() -> None:
    model = _model(AutoModelForImageTextToText, "gemma3")
    client, trunk = split_model(model, CUTS)
    batch = padded_batch()
    # Two images of two tokens each in every row; the loss is that of the text.
    kinds = torch.zeros_like(batch["input_ids"])
    kinds[:, 3:5] = kinds[:, 6:8] = 1
    _assert_parts_match(model, client, trunk, batch | {"token_type_ids": kinds})
    with torch.no_grad():
        causal, bidirectional = (
            model(**batch, **more).loss for more in ({}, {"token_type_ids": kinds})
        )
    assert not torch.equal(causal, bidirectional)


@pytest.mark.parametrize(
    ("auto_class", "family"),
    [(AutoModelForMaskedLM, "albert"), (AutoModelForMaskedLM, "xlm")],
)
def test_split_model_family_that_does_not_fit_is_refused(auto_class: type, family: str) -> None:
    with pytest.raises(SplitError):
        split_model(_model(auto_class, family), CUTS)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_loaded_parts_with_a_new_head_match_the_whole_model(family: str, tmp_path: Path) -> None:
    tiny = _model(AutoModelForMaskedLM, family) if family == "bert" else tiny_model(family)
    tiny.save_pretrained(tmp_path)
    auto_class = AutoModelForSequenceClassification
    whole = auto_class.from_pretrained(tmp_path).train()
    trunk = load_trunk_model(str(tmp_path), CUTS, auto_class=auto_class).train()
    client = load_client_model(str(tmp_path), CUTS, trunk, auto_class=auto_class).train()
    assert type(client) is type(whole)
    # A new head is random: take the same one.
    head = {n: p for n, p in whole.named_parameters() if n.startswith(("classifier", "score"))}
    assert head
    for name, parameter in head.items():
        client.get_parameter(name).data.copy_(parameter.data)
    for name, parameter in whole.named_parameters():
        if "pooler" in name:  # the masked language model had none
            client.get_parameter(name).data.copy_(parameter.data)
    _assert_parts_match(whole, client, trunk, _text(labels=LABELS))


@pytest.mark.parametrize(
    ("auto_class", "family", "cuts"),
    [
        (AutoModelForSeq2SeqLM, "t5", (1, 3)),
        (AutoModelForSeq2SeqLM, "t5", (0, 4)),
        (AutoModelForTokenClassification, "deberta-v2", (1, 3)),
        (AutoModelForImageTextToText, "qwen3_vl", (0, 3)),
        (AutoModelForImageTextToText, "gemma3", (1, 3)),
        (AutoModelForImageClassification, "vit", (0, 3)),
    ],
)
def test_loaded_parts_of_another_task_match_the_whole_model(
    auto_class: type, family: str, cuts: tuple[int, int], tmp_path: Path
) -> None:
    model = _model(auto_class, family)
    model.save_pretrained(tmp_path)
    trunk = load_trunk_model(str(tmp_path), CutLayers(*cuts), auto_class=auto_class).train()
    client = load_client_model(
        str(tmp_path), CutLayers(*cuts), trunk, auto_class=auto_class
    ).train()
    task = next(task for task in TASKS.values() if task.auto_class == auto_class.__name__)
    _assert_parts_match(model, client, trunk, next(task.batches(model))[1])


@pytest.mark.parametrize("cuts", [(0, 1), (0, 3)])
def test_loaded_client_whose_trunk_would_make_a_bias_for_the_top_is_refused(
    cuts: tuple[int, int], tmp_path: Path
) -> None:
    _model(AutoModelForSeq2SeqLM, "t5").save_pretrained(tmp_path)
    with pytest.raises(SplitError, match="first cut 1 or more"):
        load_client_model(
            str(tmp_path),
            CutLayers(*cuts),
            IdentityTrunk(),
            auto_class=AutoModelForSeq2SeqLM,
        )
