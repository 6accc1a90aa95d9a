"""What a trunk is given beside the hidden states, across real gRPC: masks, positions, arguments."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import OptimizerConfig
from flower_split.errors import SplitError, TrunkRefused
from flower_split.split import CutLayers, TrunkModel, set_trunk, split_model
from flower_split.split.trunk_side.model import TrunkInputs
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.shares import Shares
from tests.support.loopback import FINGERPRINT, coordinator, plan, remote, served
from tests.support.tiny_configs import tiny_config
from tests.support.tiny_models import assert_same_bits, loss_and_gradients, padded_batch
from tests.unit.client.test_split_over_wire import RecordingCompute
from tests.unit.split.coverage import TASKS

pytestmark = pytest.mark.filterwarnings("ignore")
CUTS = CutLayers(1, 3)
SHARED_BY_ALL_LAYERS = ("relative_attention_bias", "rel_embeddings", "encoder.LayerNorm")


@pytest.fixture(autouse=True)
def _silent() -> None:
    transformers.utils.logging.set_verbosity(50)


def _model(auto_class: str, family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, auto_class).from_config(tiny_config(family)).train()


@contextmanager
def _connected(trunk: TrunkModel) -> Iterator[tuple[RemoteTrunk, RecordingCompute]]:
    compute = RecordingCompute(
        trunk, OptimizerConfig(name="sgd", learning_rate=0.1, max_grad_norm=0.0), seed=0
    )
    engine = TrunkEngine(
        compute,
        mode="joint",
        hidden_size=trunk.hidden_size,
        fingerprint=FINGERPRINT,
        activation_bytes=1 << 26,
        shares=Shares(evaluations=10),
    )
    with served(engine) as port, coordinator(port) as control:
        control.begin_round(plan())
        with remote(port) as wire:
            wire.open(1)
            yield wire, compute


def _assert_matches_over_grpc(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    loss, expected = loss_and_gradients(model, batch)
    client, trunk = split_model(model, CUTS)
    with _connected(trunk) as (wire, compute):
        set_trunk(client, wire)
        with wire.micro_batch(0, 0, num_tokens=3, loss_denominator=20.0, last=True):
            split_loss = client(**batch).loss
        split_loss.backward()
    gradients = {n: p.grad for n, p in client.named_parameters() if p.requires_grad}
    gradients |= compute.gradients
    assert torch.equal(loss, split_loss)
    used = {name for name, gradient in expected.items() if gradient is not None}
    assert_same_bits({n: expected[n] for n in used}, {n: gradients[n] for n in used})


def _batch(task: str, model: PreTrainedModel) -> dict[str, Tensor]:
    return next(TASKS[task].batches(model))[1]


@pytest.mark.parametrize(
    ("task", "family"),
    [
        ("seq2seq", "t5"),
        ("sequence-classification", "deberta-v2"),
        ("masked-lm", "mpnet"),
    ],
)
def test_frozen_bias_of_all_layers_over_grpc_matches_unsplit(task: str, family: str) -> None:
    model = _model(TASKS[task].auto_class, family)
    frozen = 0
    for name, parameter in model.named_parameters():
        if any(part in name for part in SHARED_BY_ALL_LAYERS):
            parameter.requires_grad_(False)
            frozen += 1
    assert frozen
    _assert_matches_over_grpc(model, _batch(task, model))


def test_trained_bias_of_all_layers_over_grpc_is_refused() -> None:
    model = _model("AutoModelForSeq2SeqLM", "t5")
    client, trunk = split_model(model, CUTS)
    with _connected(trunk) as (wire, _):
        set_trunk(client, wire)
        with wire.micro_batch(0, 0, num_tokens=3, loss_denominator=20.0, last=True):
            with pytest.raises(SplitError, match="Freeze those weights"):
                client(**_batch("seq2seq", model))


def test_masks_of_images_over_grpc_match_unsplit() -> None:
    model = _model("AutoModelForImageTextToText", "gemma3")
    kinds = torch.zeros(3, 9, dtype=torch.long)
    kinds[:, 3:6] = 1
    _assert_matches_over_grpc(model, padded_batch() | {"token_type_ids": kinds})


def test_positions_of_several_axes_over_grpc_match_unsplit() -> None:
    model = _model("AutoModelForImageTextToText", "qwen3_vl")
    positions = torch.arange(9).expand(3, 3, -1).clone()
    positions[1, :, 2:6] = 2  # rows of a picture
    _assert_matches_over_grpc(model, padded_batch() | {"position_ids": positions})


def test_frozen_features_of_images_over_grpc_match_unsplit() -> None:
    model = _model("AutoModelForImageTextToText", "qwen3_vl")
    model.model.visual.requires_grad_(False)
    _assert_matches_over_grpc(model, _batch("image-text-to-text", model))


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_generation_after_images_over_grpc_matches_unsplit(family: str) -> None:
    model = _model("AutoModelForImageTextToText", family).eval()
    client, trunk = split_model(model, CUTS)
    batch = _batch("image-text-to-text", model)
    del batch["labels"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**batch, **options)
    with _connected(trunk) as (wire, _):
        set_trunk(client, wire)
        assert torch.equal(client.generate(**batch, **options), expected)


def test_layer_argument_that_no_layer_takes_is_refused_by_the_trunk() -> None:
    _, trunk = split_model(_model("AutoModelForCausalLM", "llama"), CUTS)
    with _connected(trunk) as (wire, _), torch.no_grad():
        with pytest.raises(TrunkRefused, match="layer_argument"):
            wire(torch.ones(1, 2, 32), layer_arguments={"__class__.x/y": torch.ones(1)})
        with pytest.raises(TrunkRefused, match="takes no such tensor"):
            wire(torch.ones(1, 2, 32), layer_arguments={"past_key_values": torch.ones(1)})
        assert torch.isfinite(wire(torch.ones(1, 2, 32))).all()


def test_trunk_inputs_named_and_back_are_the_same() -> None:
    masks = {"full_attention": torch.ones(1, 1, 2, 2, dtype=torch.bool), "sliding_attention": None}
    inputs = TrunkInputs(masks, torch.arange(2).view(1, 2), {"2": torch.ones(1, 4, 2, 2)})
    back = TrunkInputs.of(inputs.named(), torch.device("cpu"))
    assert back.attention_mask["sliding_attention"] is None
    assert torch.equal(back.attention_mask["full_attention"], masks["full_attention"])
    assert torch.equal(back.position_ids, inputs.position_ids)
    assert back.layer_arguments.keys() == {"2"}
