"""Mode ``fast`` on a GPU: near ``exact``, near central training, and the same bits twice."""

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flower_split.config import OptimizerConfig, RunConfig
from flower_split.lora import adapter_state
from flower_split.split import set_trunk
from flower_split.training.loss import Batch, causal_lm_loss
from tests.acceptance.federation import Federation, federation, make_batch, make_config, perturbed

pytestmark = [  # dynamo asks tensors for what warns
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ADAMW = OptimizerConfig(name="adamw", learning_rate=2e-3)
QUICKSTART = Path(__file__).parents[2] / "flower_split/assets/quickstart"
ROWS, LENGTH = 8, 64


def on_gpu(config: RunConfig, mode: str, *, window_batches: str = "on") -> RunConfig:
    return replace(
        config,
        train=replace(config.train, device="cuda", compute=mode),
        trunk=replace(
            config.trunk,
            device="cuda",
            compute=mode,
            window_batches=window_batches,
            optimizer=config.train.optimizer,
            join_timeout=300.0,
            window_timeout=300.0,
            call_timeout=300.0,
        ),
    )


def text_batches(path: Path, slots: int, steps: int) -> dict[int, list[Batch]]:
    """Rows of this Python's own source text, other ones for every slot."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor(tokenizer(Path(ast.__file__).read_text())["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    batches: dict[int, list[Batch]] = {slot: [] for slot in range(slots)}
    for step in range(steps):
        for slot in range(slots):
            first = (step * slots + slot) * ROWS
            chosen = rows[[(first + row) % len(rows) for row in range(ROWS)]]
            batches[slot].append(
                {
                    "input_ids": chosen,
                    "attention_mask": torch.ones_like(chosen),
                    "labels": chosen,
                }
            )
    return batches


class Through(torch.nn.Module):
    """A trunk of no layers."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden_states


def compiled(run: Federation, batches: dict[int, list[Batch]]) -> Federation:
    """Compile every client's layers before the round: several threads of a process cannot at once."""
    for slot, (batch, *_) in batches.items():
        model = run.client_model(slot).train()
        set_trunk(model, Through())
        causal_lm_loss(model, batch, 1, run.client_model(slot).device).backward()
        model.zero_grad(set_to_none=True)
    return run


def losses(config: RunConfig, batches: dict[int, list[Batch]], steps: int) -> list[float]:
    with federation(config) as run:
        start = adapter_state(compiled(run, batches).client_model(0))
        _, results, _ = run.train(start, batches, num_steps=steps)
    return [step.loss for result in results.values() for step in result.steps]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fifty_steps_of_the_quick_start_model_are_within_a_thousandth_of_exact(dtype: str) -> None:
    config = make_config(QUICKSTART, optimizer=ADAMW, local_steps=50)
    config = replace(config, model=replace(config.model, dtype=dtype))
    batches = text_batches(QUICKSTART, 2, 50)
    found = {mode: losses(on_gpu(config, mode), batches, 50) for mode in ("exact", "fast")}
    far = [abs(a - b) / a for a, b in zip(found["exact"], found["fast"], strict=True)]
    print(f"{dtype}: largest {max(far):.2e}, last losses {found['exact'][-1]:.4f}")
    assert found["exact"][49] < 0.9 * found["exact"][0]
    assert max(far) < 1e-3


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(path)
    return path


def digest(config: RunConfig, batches: dict[int, list[Batch]], order: Sequence[int]) -> str:
    with federation(config) as run:
        client0 = perturbed(adapter_state(compiled(run, batches).client_model(0)), 7)
        run.load_trunk(perturbed(run.engine.adapter(), 8))
        states, _, report = run.train(client0, batches, order=order, num_steps=3)
    return report.digest + "".join(
        str(float(tensor.double().sum())) for state in states.values() for tensor in state.values()
    )


@pytest.mark.parametrize("window_batches", ["on", "off"])
def test_two_runs_of_fast_end_on_one_hash_whatever_the_order(
    half: Path, window_batches: str
) -> None:
    config = make_config(half, optimizer=ADAMW, local_steps=3)
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    config = on_gpu(config, "fast", window_batches=window_batches)
    batches = {slot: [make_batch(4, [256] * 4, seed=slot)] * 3 for slot in range(4)}
    orders = ((0, 1, 2, 3), (3, 1, 2, 0), (2, 0, 3, 1))
    assert len({digest(config, batches, order) for order in orders}) == 1
