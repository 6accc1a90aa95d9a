"""TRL's SFTTrainer on the split client equals the same trainer on the unsplit model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from flower_split.config import RunConfig  # noqa: E402
from flower_split.integrations.trainer import (  # noqa: E402
    LocalTrunkOptimizer,
    connect_trainer,
)
from flower_split.parties.parts import model_cuts  # noqa: E402
from flower_split.split import split_model  # noqa: E402
from tests.support.sampling import sampled  # noqa: E402
from tests.support.trainer_rig import (  # noqa: E402
    SGD,
    STEPS,
    VOCAB_SIZE,
    Run,
    arguments,
    assert_equal_runs,
    checkpoint,
    client_trunk,
    examples,
    remote_client,
    run_config,
    served,
    whole_model,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*padding-free.*:UserWarning"),
]

CASES: dict[str, dict[str, object]] = {
    "padded": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "packed": {"packing": True, "max_length": 32, "packing_strategy": "bfd"},
    "dft": {"loss_type": "dft", "gradient_accumulation_steps": 2},
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[EOS]": 1} | {f"w{i}": i for i in range(2, VOCAB_SIZE)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="w2"
    )


class RecordingSFT(SFTTrainer):
    """Keeps the loss of every micro-batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def sft(model: PreTrainedModel, path: Path, **changes: object) -> RecordingSFT:
    values = arguments(path, SGD)
    del values["remove_unused_columns"], values["use_cache"]
    trainer = RecordingSFT(
        model=model,
        args=SFTConfig(**{**values, "bf16": False, "gradient_checkpointing": False, **changes}),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in examples(40)]),
        processing_class=tokenizer(),
    )
    trainer.losses = []
    return trainer


def unsplit(config: RunConfig, path: Path, **changes: object) -> Run:
    model = whole_model(config)
    trainer = sft(model, path, **changes)
    trainer.train()
    return Run(trainer.losses, model)


def in_process(config: RunConfig, path: Path, **changes: object) -> Run:
    client, trunk = split_model(whole_model(config), model_cuts(config))
    trainer = sft(client, path, **changes)
    trainer.add_callback(LocalTrunkOptimizer(trunk, config.trunk.optimizer))
    trainer.train()
    return Run(trainer.losses, client, trunk)


def over_grpc(config: RunConfig, path: Path, **changes: object) -> Run:
    with served(config) as fed:
        client = remote_client(fed)
        with client_trunk(fed, client):
            trainer = sft(client, path, **changes)
            connect_trainer(trainer)
            trainer.train()
        report = fed.coordinator.prepare_round("test", 1, 0)
        assert report.optimizer_steps == STEPS
        run = Run(trainer.losses, client)
        run.adapter.update(fed.coordinator.get_adapter())
        return run


@pytest.mark.parametrize("way", [in_process, over_grpc])
@pytest.mark.parametrize("case", sampled(CASES, "packed", "dft"))
def test_sft_trainer_split_equals_unsplit(tmp_path: Path, way: Any, case: str) -> None:
    config = run_config(checkpoint(tmp_path / "model"), SGD)
    expected = unsplit(config, tmp_path, **CASES[case])
    assert_equal_runs(expected, way(config, tmp_path, **CASES[case]))
    assert expected.losses[0] != expected.losses[-1]


def test_sft_trainer_at_its_default_max_grad_norm_equals_unsplit(tmp_path: Path) -> None:
    optimizer = replace(SGD, max_grad_norm=1.0)
    config = run_config(checkpoint(tmp_path / "model"), optimizer)
    over_model = replace(config.train, optimizer=optimizer, max_grad_norm_over="model")
    config = replace(config, train=over_model)
    default = SFTConfig("out", bf16=False).max_grad_norm
    expected = unsplit(config, tmp_path, max_grad_norm=default)
    assert_equal_runs(expected, over_grpc(config, tmp_path, max_grad_norm=default))
