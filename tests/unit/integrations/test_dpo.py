"""TRL's DPOTrainer on a client: the reference policy's pass has to be without the trunk's LoRA too."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from flower_split.errors import SplitError  # noqa: E402
from flower_split.integrations.trainer import connect_trainer  # noqa: E402
from flower_split.parties.parts import model_cuts  # noqa: E402
from flower_split.split import set_trunk, split_model  # noqa: E402
from tests.support.trainer_rig import (  # noqa: E402
    SGD,
    Run,
    arguments,
    assert_equal_runs,
    checkpoint,
    client_trunk,
    remote_client,
    run_config,
    served,
    whole_model,
)
from tests.unit.integrations.test_sft import tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, on a model without a generation config


class RecordingDPO(DPOTrainer):
    """Keeps the loss of every micro-batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def dpo(
    model: PreTrainedModel | PeftModel, path: Path, reference: PreTrainedModel | None = None
) -> RecordingDPO:
    values = arguments(path, SGD)
    del values["remove_unused_columns"], values["use_cache"]
    rows = [
        {"prompt": f"w{n} w{n + 1}", "chosen": f" w{n + 2} w{n + 3}", "rejected": f" w{n + 4} w5"}
        for n in range(6, 30)
    ]
    trainer = RecordingDPO(
        model=model,
        ref_model=reference,
        args=DPOConfig(**{**values, "bf16": False, "gradient_checkpointing": False}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    trainer.losses = []
    return trainer


def test_dpo_with_a_whole_reference_model_equals_unsplit(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    config = run_config(path, SGD)
    reference = AutoModelForCausalLM.from_pretrained(path)
    whole = whole_model(config)
    trainer = dpo(whole, tmp_path, reference)
    trainer.train()
    expected = Run(trainer.losses, whole)
    with served(config) as fed:
        client = remote_client(fed)
        with client_trunk(fed, client):
            trainer = dpo(client, tmp_path, reference)
            connect_trainer(trainer)
            trainer.train()
        fed.coordinator.prepare_round("test", 1, 0)
        run = Run(trainer.losses, client)
        run.adapter.update(fed.coordinator.get_adapter())
    assert_equal_runs(expected, run)


def test_reference_pass_through_the_trunk_that_trains_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    config = run_config(path, SGD)
    plain, _ = split_model(AutoModelForCausalLM.from_pretrained(path), model_cuts(config))
    # PEFT's own adapter, and TRL's copy of it for the reference: the trunk's LoRA would stay on.
    targets = r".*layers\.0\..*q_proj"
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=targets))
    with served(config) as fed:
        client = remote_client(fed)
        with client_trunk(fed, client) as trunk:
            set_trunk(plain, trunk)
            trainer = dpo(adapted, tmp_path)
            connect_trainer(trainer)
            with pytest.raises(
                SplitError, match="adapters are switched off, or others.*precompute"
            ):
                trainer.train()
            with adapted.disable_adapter(), pytest.raises(SplitError, match="switched off"):
                plain(torch.ones(1, 3, dtype=torch.long))
            trainer = dpo(client, tmp_path, plain)
            with pytest.raises(SplitError, match="reference model calls a remote trunk"):
                connect_trainer(trainer)
