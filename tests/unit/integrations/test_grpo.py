"""TRL's GRPOTrainer on a client: it samples over the split; its reference is without the trunk's LoRA."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from flower_split.errors import SplitError, TrunkRefused  # noqa: E402
from flower_split.integrations.trainer import connect_trainer  # noqa: E402
from flower_split.parties.parts import model_cuts  # noqa: E402
from flower_split.split import set_trunk, split_model  # noqa: E402
from tests.support.trainer_rig import (  # noqa: E402
    SGD,
    STEPS,
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
NEW_TOKENS = 5


class RecordingGRPO(GRPOTrainer):
    """Keeps the loss of every micro-batch, and every text."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def even_words(completions: list[str], **_: object) -> list[float]:
    """The share of words with an even number: something that a text can be better or worse at."""
    return [
        sum(int(word[1:]) % 2 == 0 for word in text.split()) / NEW_TOKENS for text in completions
    ]


def grpo(
    model: PreTrainedModel | PeftModel, path: Path, texts: list[str], **changes: object
) -> RecordingGRPO:
    values = arguments(path, SGD)
    del values["remove_unused_columns"], values["use_cache"]

    def reward(completions: list[str], **columns: object) -> list[float]:
        texts.extend(completions)
        return even_words(completions)

    trainer = RecordingGRPO(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            **{
                **values,
                "bf16": False,
                "gradient_checkpointing": False,
                "per_device_train_batch_size": 4,
                "num_generations": 4,
                "max_completion_length": NEW_TOKENS,
                "temperature": 1.0,
                "beta": 0.1,
                **changes,
            }
        ),
        train_dataset=Dataset.from_list([{"prompt": f"w{n} w{n + 1} w3"} for n in range(6, 30)]),
        processing_class=tokenizer(),
    )
    trainer.losses = []
    set_seed(5)  # of what is sampled
    return trainer


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2}],
    ids=["a text for each step", "texts used twice"],
)
def test_grpo_over_the_remote_trunk_equals_unsplit(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    path = checkpoint(tmp_path / "model")
    config = run_config(path, SGD, max_evaluations=1000)
    whole = whole_model(config)
    expected_texts: list[str] = []
    trainer = grpo(whole, tmp_path, expected_texts, **changes)
    reference = trainer.ref_model
    assert reference is not None and not any("lora" in n for n, _ in reference.named_parameters())
    trainer.train()
    expected = Run(trainer.losses, whole)
    with served(config) as fed:
        client = remote_client(fed)
        texts: list[str] = []
        with client_trunk(fed, client):
            trainer = grpo(client, tmp_path, texts, **changes)
            assert trainer.ref_model is not None  # the whole base model, by the client's model.name
            connect_trainer(trainer)
            trainer.train()
        fed.coordinator.prepare_round("test", 1, 0)
        run = Run(trainer.losses, client)
        run.adapter.update(fed.coordinator.get_adapter())
    assert texts == expected_texts and len(set(texts)) > STEPS
    assert_equal_runs(expected, run, tolerance=1e-5)
    moved = perturbation(expected, Run([], whole_model(config)))
    assert moved > 1e-3  # and it has learned something


def perturbation(one: Run, other: Run) -> float:
    return max(float((one.adapter[n] - other.adapter[n]).norm()) for n in one.adapter)


def test_a_trunk_without_room_for_texts_in_a_training_round_says_so(tmp_path: Path) -> None:
    config = run_config(checkpoint(tmp_path / "model"), SGD)
    with served(config) as fed:
        client = remote_client(fed)
        with client_trunk(fed, client):
            trainer = grpo(client, tmp_path, [])
            connect_trainer(trainer)
            with pytest.raises(TrunkRefused, match=r"trunk\.max-evaluations"):
                trainer.train()


def test_reference_that_switches_the_clients_adapters_off_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    config = run_config(path, SGD, max_evaluations=1000)
    plain, _ = split_model(AutoModelForCausalLM.from_pretrained(path), model_cuts(config))
    targets = r".*layers\.0\..*q_proj"
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=targets))
    with served(config) as fed:
        client = remote_client(fed)
        with client_trunk(fed, client) as trunk:
            set_trunk(plain, trunk)
            trainer = grpo(adapted, tmp_path, [])
            assert trainer.ref_model is None  # PEFT would switch the adapters off
            connect_trainer(trainer)
            with pytest.raises(SplitError, match="adapters are switched off.*precompute"):
                trainer.train()
            trainer = grpo(client, tmp_path, [])
            trainer.ref_model = plain
            with pytest.raises(SplitError, match="reference model calls a remote trunk"):
                connect_trainer(trainer)
