"""The processes of the step benchmark: the unsplit reference, and a client."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from flower_split.bench.presets import ALPHA, PRESETS, RANK, Preset, random_batches
from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import RunConfig
from flower_split.errors import TrunkUnavailable
from flower_split.lora import attach_lora
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import client_parts, model_cuts
from flower_split.runtime.logs import quiet_libraries
from flower_split.split import load_client_model
from flower_split.split.structure.compute_mode import compute_fast
from flower_split.split.structure.stack import find_stack
from flower_split.training.loss import Batch
from flower_split.training.measures import RoundPosition, StepMetrics
from flower_split.training.round import train_round

WARM_UP = 3  # steps of each party that do not count
_GIB = 2**30
_ANSWER_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a party measured."""

    seconds: Sequence[float]  # wall-clock, of every step that counts
    beside: Mapping[str, float] = field(default_factory=dict)


class Worker:
    """A party in a process of its own.

    Args:
        run: Called with this end's counterpart and ``arguments``.
        arguments: Of it.
        num_threads: Intra-op CPU threads of the process.
    """

    def __init__(
        self, run: Callable[..., None], arguments: tuple[object, ...], num_threads: int
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_enter, args=(run, theirs, arguments, num_threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def tell(self, word: str) -> None:
        """Send a word."""
        self._pipe.send(word)

    def answer(self) -> Answer:
        """Return what the party sends next.

        Raises:
            TrunkUnavailable: It has ended, or takes too long.
        """
        try:
            if self._pipe.poll(_ANSWER_SECONDS):
                found = self._pipe.recv()
                assert isinstance(found, Answer)
                return found
        except EOFError:
            pass
        raise TrunkUnavailable(
            "a process of the benchmark ended without a result, or took more than "
            f"{_ANSWER_SECONDS:g} s; its own messages say why."
        )

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _enter(
    run: Callable[..., None], pipe: Connection, arguments: tuple[object, ...], num_threads: int
) -> None:
    quiet_libraries()
    torch.set_num_threads(num_threads)
    run(pipe, *arguments)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsplit:
    """What the whole model trains on."""

    preset: Preset
    path: str
    device: str
    rows: int
    steps: int
    accumulate: int
    compiled: bool


def run_unsplit(pipe: Connection, order: Unsplit) -> None:
    """Train the whole model as a user of PEFT does, and send the steps' seconds."""
    preset, device, accumulate = order.preset, order.device, order.accumulate
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            order.path, dtype=preset.torch_dtype
        )
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(model, lora)
    peft.train()
    if order.compiled:
        for layer in model.model.layers:
            vars(layer)["forward"] = torch.compile(layer.forward)
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batches = random_batches(preset, order.rows, (order.steps + WARM_UP) * accumulate, 0)
    half = preset.torch_dtype is not torch.float32
    seconds = []
    for step in range(order.steps + WARM_UP):
        began = time.perf_counter()
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device, dtype=preset.torch_dtype, enabled=half):
                loss = peft(**moved, use_cache=False).loss / accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    pipe.send(Answer(seconds[WARM_UP:], _peak(device)))


def run_client(pipe: Connection, config: RunConfig, address: str, slot: int, token: str) -> None:
    """Load, say so, wait for a word, train one round, send the steps' seconds."""
    trunk = RemoteTrunk(
        address,
        token=token,
        fingerprint=fingerprint(config),
        mode="joint",
        call_timeout=config.trunk.call_timeout,
        transport=config.trunk.transport,
    )
    device = config.train.device
    cuts = model_cuts(config)
    model = load_client_model(
        config.model.name, cuts, trunk, dtype=config.model.dtype, device=device
    )
    attach_lora(model, cuts, client_parts(config), seed=0)
    if config.train.compute == "fast":
        one_at_a_time = config.train.gradient_accumulation_steps == 1
        compute_fast(model, find_stack(model).layers(model), one_at_a_time=one_at_a_time)
    pipe.send(Answer(()))
    pipe.recv()
    steps = config.train.local_steps + WARM_UP
    preset = next(p for p in PRESETS.values() if p.hidden == model.config.hidden_size)
    accumulate = config.train.gradient_accumulation_steps
    batches = random_batches(preset, config.train.batch_size, steps * accumulate, slot)
    clock = _Clock(batches)
    position = RoundPosition(
        server_round=1, num_server_rounds=1, num_steps=steps, partition_id=slot
    )
    trunk.open(steps)
    result = train_round(model, iter(clock), config, position, trunk)
    clock.times.append(time.perf_counter())
    trunk.close()
    pipe.send(Answer(clock.seconds(accumulate), _shares(result.steps[WARM_UP:])))


class _Clock:
    """Batches that note when each is taken: a step begins with its first."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self.times: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self.times.append(time.perf_counter())
            yield batch

    def seconds(self, accumulate: int) -> list[float]:
        """Return the wall-clock seconds of every step that counts."""
        begins = [*self.times[:-1:accumulate], self.times[-1]]
        taken = [after - before for before, after in zip(begins, begins[1:], strict=False)]
        return taken[WARM_UP:]


def _shares(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Return where a client's time went; with micro-batches in flight they overlap."""
    names = ("compute", "wait", "trunk", "wire")
    shares = {
        f"{name} ms": 1e3 * statistics.median(getattr(step, f"{name}_seconds") for step in steps)
        for name in names
    }
    moved = statistics.median(step.bytes_sent + step.bytes_received for step in steps)
    return {**shares, "MB": moved / 1e6}


def _peak(device: str) -> dict[str, float]:
    if not device.startswith("cuda"):
        return {}
    return {"peak GiB": torch.cuda.max_memory_allocated() / _GIB}
