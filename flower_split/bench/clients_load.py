"""The processes of the clients' benchmark: many clients without models, and the arithmetic alone."""

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from transformers import AutoConfig

from flower_split.bench.step_parties import Answer
from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import RunConfig
from flower_split.lora import attach_lora
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import model_cuts, trunk_parts
from flower_split.split import load_trunk_model
from flower_split.split.loading.model_source import ModelSource
from flower_split.trunk.compute.compute import TrunkCompute

WARM_UP = 1  # windows of a turn that do not count
_GRADIENT = 1e-4  # about the size of a real one


def tokens_of(turn: int, count: int) -> dict[int, str]:
    """Return the session tokens of a turn's clients, by slot."""
    return {slot: f"benchmark-{turn}-{count}-{slot}" for slot in range(count)}


def run_load(pipe: Connection, config: RunConfig, address: str) -> None:
    """Say that it is there; then, for every turn and number, train with so many sessions at once."""
    known = fingerprint(config)
    pipe.send(Answer(()))
    with suppress(EOFError):  # the benchmark is over
        while True:
            turn, count = str(pipe.recv()).split()
            tokens = tokens_of(int(turn), int(count))
            pipe.send(Answer(_windows(config, address, known, tokens)))


def _windows(
    config: RunConfig, address: str, known: Mapping[str, str], tokens: Mapping[int, str]
) -> list[float]:
    """Train with all sessions at once, and return the seconds of the windows that count.

    A window begins where the one before it ended: the optimizer step waits for every client.
    """
    steps = config.train.local_steps + WARM_UP
    begun = threading.Barrier(len(tokens))

    def train(slot: int, token: str) -> list[float]:
        smashed, gradient = _tensors(config, slot)
        with closing(
            RemoteTrunk(
                address,
                token=token,
                fingerprint=known,
                mode="joint",
                call_timeout=config.trunk.call_timeout,
                transport=config.trunk.transport,
            )
        ) as trunk:
            trunk.open(steps)
            begun.wait(config.trunk.call_timeout)
            times = [time.perf_counter()]
            num_tokens = smashed.shape[0] * smashed.shape[1]
            for step in range(steps):
                leaf = smashed.clone().requires_grad_()
                with trunk.micro_batch(
                    step, 0, num_tokens=num_tokens, loss_denominator=num_tokens, last=True
                ):
                    output = trunk(leaf, use_cache=False)
                torch.autograd.grad(output, [leaf, trunk.always], gradient, allow_unused=True)
                times.append(time.perf_counter())
            begun.wait(config.trunk.call_timeout)  # nobody leaves before all are done
        return times

    with ThreadPoolExecutor(len(tokens)) as pool:
        found = list(pool.map(train, tokens.keys(), tokens.values()))
    # A window is over when its last client has been answered.
    ends = [max(times[step] for times in found) for step in range(steps + 1)]
    seconds = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    return seconds[WARM_UP:]


def run_arithmetic(pipe: Connection, config: RunConfig) -> None:
    """Send the seconds of forward and backward of one micro-batch, without anything around them."""
    cuts = model_cuts(config)
    model = load_trunk_model(ModelSource.of(config.model), cuts, device=config.trunk.device)
    model.requires_grad_(False)
    attach_lora(model, cuts, trunk_parts(config), seed=0)
    compute = TrunkCompute(model, config.trunk.optimizer, seed=0)
    smashed, gradient = _tensors(config, 0)
    mask = torch.ones(smashed.shape[:2], dtype=torch.int64)
    tensors = {"hidden_states": smashed, "attention_mask": mask}
    seconds = []
    for step in range(5 * config.train.local_steps + WARM_UP):
        began = time.perf_counter()
        _, activation = compute.forward_train(tensors, seed_of=str(step), use_cache=False)
        compute.backward(activation, gradient)
        seconds.append(time.perf_counter() - began)
    pipe.send(Answer(seconds[WARM_UP:]))


def _tensors(config: RunConfig, slot: int) -> tuple[Tensor, Tensor]:
    """Return smashed data and a gradient of the output, [batch, seq, hidden]."""
    hidden = AutoConfig.from_pretrained(config.model.name).hidden_size
    generator = torch.Generator().manual_seed(slot)
    shape = (config.train.batch_size, config.train.sequence_length, hidden)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    smashed, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return smashed, _GRADIENT * gradient
