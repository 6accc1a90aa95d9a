"""The local-only baseline: the run's own configuration, trained by one client without the others."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flower_split.client.alone import train_alone
from flower_split.client.client import Client
from flower_split.client.model_cache import ClientCache
from flower_split.config import Scalar, parse_run_config
from flower_split.errors import ConfigError
from flower_split.lora import adapter_name, attach_lora
from flower_split.parties.parts import all_parts, model_cuts
from tests.support.tiny_app import make_data, make_model, tiny_config

ADAMW: dict[str, Scalar] = {
    "train__optimizer__name": "adamw",
    "train__optimizer__learning_rate": 0.01,
    "trunk__optimizer__name": "sgd",
    "trunk__optimizer__learning_rate": 0.3,
    "num_server_rounds": 2,
    "train__local_steps": 2,
}


def client_of(root: Path, **changes: Scalar) -> Client:
    config = tiny_config(make_model(root / "model"), make_data(root / "data", 2), **changes)
    cache = ClientCache()
    return Client(cache.of(cache.config(config)), 0, 2)


def trained_by_hand(client: Client) -> dict[str, torch.Tensor]:
    """Plain PyTorch: AdamW over bottom and top and SGD over the trunk, each made once."""
    config = client.config
    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    attach_lora(model, model_cuts(config), all_parts(config), seed=config.seed)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    trunk = [p for n, p in named.items() if ".layers.1." in n or ".layers.2." in n]
    others = [p for n, p in named.items() if ".layers.0." in n or ".layers.3." in n]
    assert len(trunk) + len(others) == len(named)
    adamw = torch.optim.AdamW(others, lr=0.01, weight_decay=0.0)
    sgd = torch.optim.SGD(trunk, lr=0.3)
    for server_round in (1, 2):
        batches = client.batches(server_round)
        for _ in range(2):
            batch = next(batches)
            labels = batch["labels"]
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
            loss.backward()
            adamw.step()
            sgd.step()
            model.zero_grad()
    return {adapter_name(n): p.detach() for n, p in named.items()}


def test_alone_keeps_one_optimizer_per_part_over_all_rounds(tmp_path: Path) -> None:
    client = client_of(tmp_path, **ADAMW)
    expected = trained_by_hand(client)
    adapter = train_alone(client)
    assert adapter.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(adapter[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "trained"), [("joint", {0, 1, 2, 3}), ("frozen", {0, 3}), ("forward-only", {3})]
)
def test_alone_trains_the_parts_that_the_run_trains(
    mode: str, trained: set[int], tmp_path: Path
) -> None:
    adapter = train_alone(client_of(tmp_path, mode=mode))
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in adapter}
    moved = {
        int(name.split(".layers.")[1].split(".")[0])
        for name, value in adapter.items()
        if name.endswith("lora_B.weight") and value.abs().max() > 0  # B begins with zeros
    }
    assert moved == layers == trained


def test_alone_with_a_trunk_that_trains_in_full_is_refused() -> None:
    with pytest.raises(ConfigError, match="local-only-baseline = false"):
        parse_run_config({"local-only-baseline": True, "trunk.train": "full"})
