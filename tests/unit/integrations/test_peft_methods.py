"""PEFT's own ``get_peft_model`` on a split client: every method trains it as it trains the model.

Same initial weights, same batch: the loss and every gradient are those of the unsplit model, bit for
bit, or the call is refused.
"""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split import CutLayers, split_model
from tests.support.tiny_models import padded_batch, tiny_model

# PEFT's own remarks on what it does.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
]

CUTS = CutLayers(1, 3)
OWN = r".*layers\.(0|3)\..*(q_proj|v_proj|down_proj)"  # of the client's layers
TOKENS = padded_batch()["input_ids"].unique()[1:4].tolist()
SQUARE = r".*layers\.(0|3)\..*(q_proj|o_proj)"  # for methods that share one matrix


def lora(**changes: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": OWN, **changes})


def named(name: str) -> PeftConfig:
    """A method of newer versions."""
    return getattr(peft, name)(target_modules=SQUARE)


METHODS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lora,
    "lora, gaussian": lambda: lora(init_lora_weights="gaussian"),
    "lora, orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "lora, random": lambda: lora(init_lora_weights=False),
    "lora, pissa": lambda: lora(init_lora_weights="pissa"),
    "lora, pissa fast": lambda: lora(init_lora_weights="pissa_niter_4"),
    "lora, olora": lambda: lora(init_lora_weights="olora"),
    "lora, mica": lambda: lora(init_lora_weights="mica"),
    "lora, rslora": lambda: lora(use_rslora=True),
    "lora, dora": lambda: lora(use_dora=True),
    "lora, qalora": lambda: lora(use_qalora=True, qalora_group_size=8),
    "lora, bias of B": lambda: lora(lora_bias=True),
    "lora, biases": lambda: lora(bias="lora_only"),
    "lora, patterns": lambda: lora(rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 32}),
    "lora, modules to save": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    "lora, tokens": lambda: lora(trainable_token_indices=TOKENS),
    "lora, embeddings and head": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "lora, a parameter": lambda: lora(
        target_modules=[], target_parameters=["layers.3.mlp.down_proj.weight"]
    ),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=OWN),
    "ia3": lambda: IA3Config(
        target_modules=OWN, feedforward_modules=r".*layers\.(0|3)\.mlp\.down_proj"
    ),
    "loha": lambda: LoHaConfig(r=4, target_modules=OWN),
    "lokr": lambda: LoKrConfig(r=4, target_modules=OWN),
    "oft": lambda: OFTConfig(r=0, oft_block_size=8, target_modules=OWN),
    "boft": lambda: BOFTConfig(boft_block_size=8, target_modules=OWN),
    "vera": lambda: VeraConfig(r=4, target_modules=SQUARE),
    "vblora": lambda: VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, target_modules=OWN),
    "randlora": lambda: RandLoraConfig(r=4, target_modules=SQUARE),
    "fourierft": lambda: FourierFTConfig(n_frequency=20, target_modules=OWN),
    "hra": lambda: HRAConfig(r=4, target_modules=OWN),
    "c3a": lambda: C3AConfig(block_size=8, target_modules=OWN),
    "miss": lambda: MissConfig(r=4, target_modules=OWN),
    "layer norms": lambda: LNTuningConfig(target_modules=r".*layers\.(0|3)\..*layernorm"),
    "shira": lambda: ShiraConfig(r=4, target_modules=OWN),
    "road": lambda: RoadConfig(group_size=8, target_modules=OWN),
    "waveft": lambda: WaveFTConfig(n_frequency=20, target_modules=OWN),
    "delora": lambda: DeloraConfig(r=4, target_modules=OWN),
    "osf": lambda: named("OSFConfig"),
    "peanut": lambda: named("PeanutConfig"),
    "lily": lambda: named("LilyConfig"),
    "hira": lambda: named("HiraConfig"),
    "gralora": lambda: named("GraloraConfig"),
    "tinylora": lambda: named("TinyLoraConfig"),
    "unilora": lambda: named("UniLoraConfig"),
    "pvera": lambda: named("PveraConfig"),
    "frod": lambda: named("FrodConfig"),
    "deft": lambda: named("DeftConfig"),
    "beft": lambda: named("BeftConfig"),
    "trainable tokens": lambda: TrainableTokensConfig(
        token_indices=TOKENS, target_modules=["embed_tokens"]
    ),
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "multitask prompts": lambda: MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=1
    ),
    "adaption prompt": lambda: AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_layers=1, adapter_len=4
    ),
}
REFUSED: dict[str, Callable[[], PeftConfig]] = {
    # Its prefix is a key-value cache of every layer, also of the trunk's, which are not here.
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "layer replication": lambda: lora(
        layer_replication=[[0, 4], [2, 4]], target_modules=["q_proj"]
    ),
}
ON_ALL_LAYERS: dict[str, Callable[[], PeftConfig]] = {
    "lora, all linear": lambda: lora(target_modules="all-linear"),
    "lora, dora": lambda: lora(use_dora=True, target_modules="all-linear"),
    "lora, all biases": lambda: lora(bias="all", target_modules=["q_proj"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "oft": lambda: OFTConfig(r=0, oft_block_size=8, target_modules="all-linear"),
}

Adapted = tuple[Tensor, dict[str, Tensor | None]]


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with biases, and the client of a split of it, whose trunk is in process."""
    model = tiny_model("llama", attention_bias=True)
    return model, split_model(copy.deepcopy(model), CUTS)[0]


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Move everything that trains away from its beginning; returns the model's tensors."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.state_dict()


def loss_and_gradients(model: nn.Module, *others: nn.Module) -> Adapted:
    batch = padded_batch()
    if getattr(model, "active_peft_config", None).__class__ is MultitaskPromptTuningConfig:
        batch["task_ids"] = torch.zeros(3, dtype=torch.long)
    for module in (model, *others):
        module.zero_grad(set_to_none=True)
    loss = model.train()(**batch).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad
        for module in (model, *others)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def assert_same(whole: Adapted, split: Adapted) -> None:
    assert torch.isfinite(whole[0]) and torch.equal(whole[0], split[0])
    assert whole[1].keys() == split[1].keys() and whole[1]
    for name, expected in whole[1].items():
        found = split[1][name]
        assert found is not None and expected is not None and torch.equal(found, expected), name
    assert any(value is not None and bool(value.any()) for value in whole[1].values())


def adapted(models: tuple[nn.Module, nn.Module], config: Callable[[], PeftConfig]) -> nn.Module:
    """The client with the method of ``config``, at the values of the unsplit model's."""
    whole, client = (copy.deepcopy(model) for model in models)
    torch.manual_seed(1)
    state = moved(get_peft_model(whole, config()))
    torch.manual_seed(1)
    split = get_peft_model(client, config())
    own = split.state_dict().keys()
    split.load_state_dict({name: value for name, value in state.items() if name in own})
    return split


@pytest.mark.parametrize("method", METHODS)
def test_method_on_the_clients_layers_trains_as_on_the_unsplit_model(
    models: tuple[PreTrainedModel, PreTrainedModel], method: str
) -> None:
    torch.manual_seed(1)
    whole = get_peft_model(copy.deepcopy(models[0]), METHODS[method]())
    moved(whole)
    assert_same(loss_and_gradients(whole), loss_and_gradients(adapted(models, METHODS[method])))


@pytest.mark.parametrize("method", REFUSED)
def test_method_that_reaches_into_the_trunk_is_refused(
    models: tuple[PreTrainedModel, PreTrainedModel], method: str
) -> None:
    torch.manual_seed(1)
    with pytest.raises(SplitError):
        loss_and_gradients(get_peft_model(copy.deepcopy(models[1]), REFUSED[method]()))


@pytest.mark.parametrize("method", ON_ALL_LAYERS)
def test_model_that_peft_adapted_trains_the_same_once_it_is_split(
    models: tuple[PreTrainedModel, PreTrainedModel], method: str
) -> None:
    torch.manual_seed(1)
    whole = get_peft_model(copy.deepcopy(models[0]), ON_ALL_LAYERS[method]())
    moved(whole)
    model = whole.get_base_model()
    expected = loss_and_gradients(model)
    client, trunk = split_model(model, CUTS)
    assert any(parameter.requires_grad for parameter in trunk.parameters())
    assert_same(expected, loss_and_gradients(client, trunk))
