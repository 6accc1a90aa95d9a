"""A run's training as a user of PEFT would write it: one process, one model, the clients' batches.

``python -m flower_split.bench.plain_peft`` reads its order, a JSON line, from standard input, and writes
what it measured as one to standard output. Of this package it uses what reads and tokenises the data, so
that the tokens are the run's, and nothing else: it is the reference, and must not be slower than plain
transformers and PEFT. An optimizer step takes the micro-batches that all clients take in it.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flower_split.config import LoraPartConfig, RunConfig, parse_run_config
from flower_split.data import ClientData, load_client_data, load_tokenizer
from flower_split.data.batches import batches, eval_batches
from flower_split.runtime.logs import quiet_libraries
from flower_split.split.loading.model_source import ModelSource

Batch = dict[str, Tensor]


class _Clock:
    """Adds up the seconds of phases; every moment belongs to one."""

    def __init__(self, began: float) -> None:
        self.seconds = {"start": 0.0, "training": 0.0, "evaluation": 0.0}
        self._last = began

    def lap(self, phase: str) -> None:
        """Give ``phase`` the time since the last call."""
        now = time.time()
        self.seconds[phase] += now - self._last
        self._last = now


def train(config: RunConfig, seeds: Sequence[Sequence[int]], began: float) -> dict[str, float]:
    """Train and evaluate as often as the run does; return seconds by phase, and what was counted.

    Args:
        config: The run's.
        seeds: Of every client's order of batches, by client and by round.
        began: When the process was started, by ``time.time``.
    """
    clock = _Clock(began)
    tokenizer = load_tokenizer(config.model)
    count = config.num_clients
    clients = [load_client_data(config, tokenizer, slot, count) for slot in range(count)]
    source = ModelSource.of(config.model)
    base = AutoModelForCausalLM.from_pretrained(
        source.name_or_path, dtype=getattr(torch, config.model.dtype)
    )
    peft = get_peft_model(base, _lora(config.lora.trunk))
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.train.optimizer.learning_rate,
        weight_decay=config.train.optimizer.weight_decay,
    )
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    clock.lap("start")
    loss = _evaluate(peft, config, clients, pad)
    clock.lap("evaluation")
    tokens = 0
    for server_round in range(1, config.num_server_rounds + 1):
        streams = [
            batches(
                client.train,
                config.train.batch_size,
                seed=of_rounds[server_round - 1],
                pad_token_id=pad,
            )
            for client, of_rounds in zip(clients, seeds, strict=True)
        ]
        for _ in range(config.train.local_steps):
            tokens += _step(peft, trained, optimizer, streams, config)
        clock.lap("training")
        last = server_round == config.num_server_rounds
        if last or server_round % config.evaluate_every == 0:
            loss = _evaluate(peft, config, clients, pad)
            clock.lap("evaluation")
    return {**clock.seconds, "tokens": tokens, "held-out loss": loss}


def _lora(part: LoraPartConfig) -> LoraConfig:
    names = part.target_modules
    return LoraConfig(
        r=part.r,
        lora_alpha=int(part.alpha),
        lora_dropout=part.dropout,
        target_modules=names if "," not in names else [n.strip() for n in names.split(",")],
        task_type="CAUSAL_LM",
    )


def _step(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    streams: Sequence[Iterator[Batch]],
    config: RunConfig,
) -> int:
    """Take one optimizer step over every client's micro-batches; return its label tokens."""
    accumulate = config.train.gradient_accumulation_steps
    taken = [batch for stream in streams for batch in itertools.islice(stream, accumulate)]
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in taken)
    model.train()
    for batch in taken:
        loss = model(**batch, use_cache=False, num_items_in_batch=total).loss
        loss.backward()
    if config.train.optimizer.max_grad_norm > 0:
        nn.utils.clip_grad_norm_(trained, config.train.optimizer.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


@torch.inference_mode()
def _evaluate(
    model: nn.Module, config: RunConfig, clients: Sequence[ClientData], pad: int
) -> float:
    """Return the held-out loss over all clients, in nats per label token."""
    model.eval()
    summed, tokens = 0.0, 0
    for client in clients:
        once = eval_batches(client.evaluate, config.train.batch_size, pad)
        for batch in itertools.islice(once, config.data.max_eval_batches or None):
            loss = model(**batch, use_cache=False, num_items_in_batch=1).loss
            summed += float(loss)
            tokens += int((batch["labels"][:, 1:] != -100).sum())
    return summed / tokens


def _main() -> None:
    quiet_libraries()
    order = json.loads(sys.stdin.readline())
    torch.set_num_threads(order["num_threads"])
    found = train(parse_run_config(order["config"]), order["seeds"], order["began"])
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
