"""Models against their tokenizer and sequences, by their configuration alone."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLNetConfig,
)

from flower_split.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from flower_split.data import check_data, load_client_data
from flower_split.data.model_limits import max_positions, sees_later_tokens
from flower_split.errors import ConfigError
from tests.unit.data.conftest import WORDS

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32}


def _llama(**changes: object) -> LlamaConfig:
    return LlamaConfig(
        **{**SMALL, "intermediate_size": 16, "max_position_embeddings": 32, **changes}
    )


def _bert(**changes: object) -> BertConfig:
    return BertConfig(
        **{**SMALL, "intermediate_size": 16, "max_position_embeddings": 32, **changes}
    )


def _config(
    path: Path, model: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, length: int = 8
) -> RunConfig:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return RunConfig(
        model=ModelConfig(name=str(path), first_cut=0, second_cut=1),
        train=TrainConfig(sequence_length=length),
        data=DataConfig(source="jsonl", path="nowhere"),
    )


def test_tokenizer_larger_than_the_embedding_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    check_data(_config(tmp_path / "fits", _llama(vocab_size=len(WORDS)), tokenizer))
    config = _config(tmp_path / "small", _llama(vocab_size=len(WORDS) - 1), tokenizer)
    with pytest.raises(ConfigError, match="ids up to 14, and the embedding 14 rows"):
        check_data(config)
    with pytest.raises(ConfigError, match="resize_token_embeddings"):
        load_client_data(config, tokenizer, 0, 1)  # before it looks for the data


def test_sequences_longer_than_the_positions_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    learned = GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, vocab_size=32)
    for name, model in (("rotary", _llama()), ("learned", learned)):
        check_data(_config(tmp_path / name, model, tokenizer, 32))
        with pytest.raises(ConfigError, match="train.sequence-length must be at most .*32.*is 33"):
            check_data(_config(tmp_path / name, model, tokenizer, 33))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (_llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), 128),
        (
            _llama(
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 8,
                }
            ),
            32,
        ),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (BloomConfig(), None),
    ],
)
def test_positions_of_a_configuration(model: PreTrainedConfig, expected: int | None) -> None:
    assert max_positions(model) == expected


def _changes_the_past(config: PreTrainedConfig) -> bool:
    """Whether another last token changes the logits before it, in a random model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(4, 10).view(1, 6)
    other = ids.clone()
    other[0, -1] = 3
    with torch.no_grad():
        first, second = (model(input_ids=each).logits[0, :-1] for each in (ids, other))
    return not torch.allclose(first, second, atol=1e-6)


XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16, "vocab_size": 32}


@pytest.mark.parametrize(
    "model",
    [
        _bert(),
        _bert(is_decoder=True),
        _llama(),
        XLNetConfig(**XLNET),
        XLNetConfig(**XLNET, attn_type="uni"),
    ],
    ids=["bert", "bert-decoder", "llama", "xlnet", "xlnet-uni"],
)
def test_what_a_configuration_says_is_what_its_model_does(model: PreTrainedConfig) -> None:
    assert sees_later_tokens(model) == _changes_the_past(model)


def test_encoder_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = _config(tmp_path, _bert(), tokenizer)
    with pytest.raises(ConfigError, match="is an encoder: .*would see its own labels"):
        check_data(config)
