"""A model, private data and an app so small that a run takes seconds."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flower_split.config import Scalar, run_config_keys


def make_model(path: Path, num_layers: int = 4) -> Path:
    """A Llama with a byte tokenizer, seeded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def make_data(path: Path, num_partitions: int) -> str:
    """Prompt-completion files, one for each partition, with clearly unequal amounts of text."""
    path.mkdir(parents=True, exist_ok=True)
    for partition in range(num_partitions):
        lines = [
            {"prompt": f"{partition}{item}", "completion": "abcdefgh"[item % 5 :] * (partition + 1)}
            for item in range(4 + 2 * partition)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / f"{partition}.jsonl").write_text(text)
    return str(path / "{partition_id}.jsonl")


def tiny_config(model: Path, data: str, **changes: Scalar) -> dict[str, Scalar]:
    """A run of one round and one local step; ``changes`` take underscores for dots and dashes.

    ``train__local_steps`` is ``train.local-steps``.
    """
    config: dict[str, Scalar] = {
        "num-server-rounds": 1,
        "num-clients": 2,
        "model.name": str(model),
        "model.first-cut": 1,
        "model.second-cut": 3,
        "data.source": "jsonl",
        "data.path": data,
        "train.local-steps": 1,
        "train.batch-size": 16,
        "train.sequence-length": 64,
        "train.device": "cpu",
        "trunk.device": "cpu",
        "strategy.aggregator": "fedit",
    }
    for part in ("bottom", "trunk", "top"):
        config[f"lora.{part}.r"] = 4
    for side in ("train", "trunk"):
        config[f"{side}.optimizer.name"] = "sgd"
        config[f"{side}.optimizer.learning-rate"] = 0.5
        config[f"{side}.optimizer.max-grad-norm"] = 0.0
    for name, value in changes.items():
        config[name.replace("__", ".").replace("_", "-")] = value
    return config


def make_app(path: Path, config: Mapping[str, Scalar]) -> Path:
    """An app directory: nothing but a pyproject.toml whose components are the package's."""
    path.mkdir(parents=True)
    values = {**run_config_keys(), **config}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    (path / "pyproject.toml").write_text(
        f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "tiny"
version = "0.1.0"
description = "A run that takes seconds"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "flower_split.server.app:app"
clientapp = "flower_split.client.app:app"

[tool.flwr.app.config]
{lines}
"""
    )
    return path
