"""A client model is not saved as something that would load as a whole one."""

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from flower_split.errors import SplitError
from flower_split.split import CutLayers, load_client_model
from tests.support.tiny_models import tiny_model


@pytest.fixture
def client(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return load_client_model(str(tmp_path / "model"), CutLayers(1, 2), torch.nn.Identity())


def test_save_pretrained_of_a_client_is_refused(client, tmp_path):
    for model in (client, copy.deepcopy(client)):
        with pytest.raises(SplitError, match="only the bottom and the top.*flower-split export"):
            model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapter_of_a_client_is_saved_alone(client, tmp_path):
    client.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    client.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert names and all("lora" in name for name in names)
