"""The job that is run under faults: a 4-layer Llama of bytes, and a little text for each client."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_model(path: Path) -> None:
    """Write the model and its tokenizer, seeded."""
    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def make_data(path: Path, num_clients: int) -> str:
    """Write one JSONL file for each client, unequal in size; returns the pattern of their names."""
    path.mkdir(parents=True)
    for client in range(num_clients):
        lines = [{"text": f"{client} {item} " + "abcdef"[item % 4 :] * (client + 2)}
                 for item in range(8 + 3 * client)]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / f"{client}.jsonl").write_text(text)
    return str(path / "{partition_id}.jsonl")


def make_config(
    root: Path, num_clients: int, num_rounds: int
) -> dict[str, bool | int | float | str]:
    """The job's run config: AdamW, dropout, a schedule and sampling, so that nothing is trivial."""
    make_model(root / "model")
    config: dict[str, bool | int | float | str] = {
        "seed": 3,
        "num-server-rounds": num_rounds,
        "num-clients": num_clients,
        "fraction-train": 0.75,
        "fraction-evaluate": 1.0,
        "round-retries": 50,
        "join-timeout": 60.0,
        "round-timeout": 120.0,
        "model.name": str(root / "model"),
        "model.first-cut": 1,
        "model.second-cut": 3,
        "data.source": "jsonl",
        "data.path": make_data(root / "data", num_clients),
        "data.max-eval-batches": 1,
        "train.local-steps": 3,
        "train.batch-size": 2,
        "train.gradient-accumulation-steps": 2,
        "train.sequence-length": 32,
        "train.device": "cpu",
        "train.optimizer.schedule": "linear",
        "trunk.device": "cpu",
        "trunk.optimizer.schedule": "cosine",
        "trunk.join-timeout": 15.0,
        "trunk.window-timeout": 15.0,
        "trunk.call-timeout": 15.0,
    }
    for part in ("bottom", "trunk", "top"):
        config[f"lora.{part}.r"] = 4
        config[f"lora.{part}.dropout"] = 0.1
    return config
