"""A client's local training: round → optimizer step → micro-batch.

Shapes: input ids, padding mask and labels ``[batch, seq]``; labels are −100 where there is no loss.
``num_tokens`` counts label tokens after the causal shift. Times are wall-clock seconds.

An optimizer step's loss is the summed token loss of its micro-batches over their label tokens
together, so that gradient accumulation equals one large batch.

Next: ``flower_split/client/remote_trunk.py``, where the forward and the backward cross the network.
"""

import hashlib
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from flower_split.config import RunConfig
from flower_split.errors import DataError, FlowerSplitError
from flower_split.lora import output_embeddings
from flower_split.runtime.threads import pinned_pool
from flower_split.training.compute_turns import ComputeTurns
from flower_split.training.optimizers import LearningRate, make_optimizer
from flower_split.training.trunk_protocol import MicroBatchTrunk

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundPlace:
    """Where a round stands in the run, for one client."""

    server_round: int  # from 1
    num_server_rounds: int
    num_steps: int  # this client's optimizer steps per round
    partition_id: int
    epoch_micro_batches: int = 0  # of a pass over the data; 0: steps do not end with a pass

    def micro_batches_in(self, step: int, accumulate: int) -> int:
        """Return how many micro-batches optimizer step ``step`` of the round takes.

        Rounds of whole epochs end every pass over the data with a step of what is left of it, so
        that each example is used once per epoch.

        Args:
            step: Within the round, from 0.
            accumulate: ``train.gradient_accumulation_steps``.
        """
        if not self.epoch_micro_batches:
            return accumulate
        steps_per_epoch = math.ceil(self.epoch_micro_batches / accumulate)
        done = step % steps_per_epoch * accumulate
        return min(accumulate, self.epoch_micro_batches - done)

    @property
    def first_step(self) -> int:
        """The run's optimizer step, from 0, with which this round begins."""
        return (self.server_round - 1) * self.num_steps

    @property
    def total_steps(self) -> int:
        """This client's optimizer steps over the whole run."""
        return self.num_server_rounds * self.num_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step; times add up to its wall-clock time when one micro-batch is in flight."""

    step: int  # within the round, from 0
    loss: float  # mean over label tokens
    num_tokens: int
    compute_seconds: float  # on this client
    wait_seconds: float  # in the trunk's queue, or for the other clients of the window
    trunk_seconds: float  # computing on the trunk
    wire_seconds: float  # the rest of the calls
    bytes_sent: int
    bytes_received: int


@dataclass(frozen=True, slots=True)
class TrainResult:
    """One round's training on one client."""

    steps: list[StepMetrics]
    num_examples: int

    @property
    def num_tokens(self) -> int:
        """Label tokens over the round."""
        return sum(step.num_tokens for step in self.steps)

    @property
    def loss(self) -> float:
        """Mean token loss over the round."""
        return sum(step.loss * step.num_tokens for step in self.steps) / self.num_tokens

    @property
    def bytes_sent(self) -> int:
        """Bytes to the trunk over the round."""
        return sum(step.bytes_sent for step in self.steps)

    @property
    def bytes_received(self) -> int:
        """Bytes from the trunk over the round."""
        return sum(step.bytes_received for step in self.steps)

    def step_lists(self) -> dict[str, list[int] | list[float]]:
        """Return each measure of the steps as a list, by its name."""
        names = [item.name for item in fields(StepMetrics) if item.name != "step"]
        return {name: [getattr(step, name) for step in self.steps] for name in names}


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Held-out loss."""

    loss_sum: float  # nats
    num_tokens: int
    num_examples: int


def train_round(
    model: PreTrainedModel,
    batches: Iterator[Batch],
    config: RunConfig,
    place: RoundPlace,
    trunk: MicroBatchTrunk | None,
    proximal_mu: float = 0.0,
) -> TrainResult:
    """Train the parameters of ``model`` that require grad for one round.

    Args:
        model: The client's model with ``trunk`` in its middle; or a whole model, without one.
        batches: Endless micro-batches.
        config: The run's configuration.
        place: Which round, and how many steps.
        trunk: The open remote trunk of this round; ``None``: nothing is remote.
        proximal_mu: FedProx's μ: every step's gradient gets μ (w − w₀), that of
            μ/2 ‖w − w₀‖², where w₀ are the weights that the round began with. The losses that are
            reported are without it. (Li et al., "Federated Optimization in Heterogeneous Networks",
            MLSys 2020.)

    Raises:
        TrunkError: The trunk refused, aborted the round, or did not answer in time.
        DataError: A micro-batch has no label token.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, config.train.optimizer)
    optimizer.zero_grad(set_to_none=True)  # a round that was lost may have left some behind
    rate = LearningRate(config.train.optimizer, place.total_steps)
    steps, num_examples, accumulate = [], 0, config.train.gradient_accumulation_steps
    with pinned_pool(min(config.train.micro_batches_in_flight, accumulate), "micro-batch") as pool:
        trainer = _StepTrainer(model, parameters, config, place, trunk, pool)
        trainer.proximity = _Proximity(parameters, proximal_mu) if proximal_mu else None
        for step in range(place.num_steps):
            count = place.micro_batches_in(step, accumulate)
            micro_batches = [next(batches) for _ in range(count)]
            rate.apply(optimizer, place.first_step + step)
            steps.append(trainer.step(step, micro_batches, optimizer))
            num_examples += sum(len(batch["input_ids"]) for batch in micro_batches)
            logger.debug(
                "partition=%d round=%d step=%d loss=%.4f",
                place.partition_id,
                place.server_round,
                step,
                steps[-1].loss,
            )
    return TrainResult(steps, num_examples)


class _Proximity:
    """FedProx's pull towards the weights with which the round began."""

    def __init__(self, parameters: Sequence[nn.Parameter], mu: float) -> None:
        self._mu = mu
        self._pairs = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add μ (w − w₀) to every gradient; a parameter without one has not moved."""
        for parameter, start in self._pairs:
            if parameter.grad is not None:
                parameter.grad = parameter.grad + self._mu * (parameter - start)


class _StepTrainer:
    """The optimizer steps of one round."""

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Sequence[nn.Parameter],
        config: RunConfig,
        place: RoundPlace,
        trunk: MicroBatchTrunk | None,
        pool: Executor,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.config = config
        self.place = place
        self.trunk = trunk
        self.pool = pool
        self.device = next(iter(parameters)).device
        self.turns = ComputeTurns(self.device)
        self.proximity: _Proximity | None = None
        self.num_micro_batches = 0  # of the steps that are done; they need not be equally long
        self.auxiliary = (
            AuxiliaryHead(model, trunk) if config.train.auxiliary_head and trunk else None
        )
        if trunk is not None:
            trunk.waiting = self.turns.waiting
            trunk.take_stats()

    def step(
        self, step: int, micro_batches: Sequence[Batch], optimizer: torch.optim.Optimizer
    ) -> StepMetrics:
        """One optimizer step over ``micro_batches``."""
        started = time.perf_counter()
        tokens = [count_label_tokens(batch) for batch in micro_batches]
        loss = self._accumulate(step, micro_batches, tokens)
        self.num_micro_batches += len(micro_batches)
        if self.proximity is not None:
            self.proximity.add_gradient()
        if self.config.train.optimizer.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters, self.config.train.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        return self._metrics(step, loss, sum(tokens), seconds)

    def _accumulate(
        self, step: int, micro_batches: Sequence[Batch], tokens: Sequence[int]
    ) -> float:
        """Set ``.grad`` to the step's gradient, summed in the order of the micro-batches."""

        def run(index: int) -> tuple[float, list[Tensor | None]]:
            return self._micro_batch(step, index, micro_batches[index], tokens)

        total = 0.0
        for loss, gradients in self.pool.map(run, range(len(micro_batches))):
            total += loss
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = (
                        gradient if parameter.grad is None else parameter.grad + gradient
                    )
        return total

    def _micro_batch(
        self, step: int, index: int, batch: Batch, tokens: Sequence[int]
    ) -> tuple[float, list[Tensor | None]]:
        """The micro-batch's share of the step's loss, and its gradients."""
        count, total = len(tokens), sum(tokens)
        window, micro_batch, last = step, index, index == count - 1
        if self.config.trunk.step_every == "server-round":
            window, micro_batch = 0, self.num_micro_batches + index
            last = last and step == self.place.num_steps - 1
        named = (
            self.trunk.micro_batch(
                window, micro_batch, num_tokens=tokens[index], loss_denominator=total, last=last
            )
            if self.trunk is not None
            else nullcontext()
        )
        seed = micro_batch_seed(self.config.seed, self.place, step, index)
        with self.turns.computing(seed), named:
            loss = causal_lm_loss(self.model, batch, total, self.device)
            objective = loss if self.auxiliary is None else loss + self.auxiliary.loss(batch, total)
            # The trunk's own input makes autograd call it even where the bottom trains nothing.
            always = [self.trunk.always] if self.trunk is not None else []
            inputs = [*self.parameters, *always]
            gradients = torch.autograd.grad(objective, inputs, allow_unused=True)
        return float(loss.detach()), list(gradients[: len(self.parameters)])

    def _metrics(self, step: int, loss: float, num_tokens: int, seconds: float) -> StepMetrics:
        if self.trunk is None:
            return StepMetrics(
                step=step,
                loss=loss,
                num_tokens=num_tokens,
                compute_seconds=seconds,
                wait_seconds=0.0,
                trunk_seconds=0.0,
                wire_seconds=0.0,
                bytes_sent=0,
                bytes_received=0,
            )
        wire = self.trunk.take_stats()
        away = wire.wire_seconds + wire.trunk_queue_seconds + wire.trunk_compute_seconds
        return StepMetrics(
            step=step,
            loss=loss,
            num_tokens=num_tokens,
            compute_seconds=max(0.0, seconds - away),
            wait_seconds=wire.trunk_queue_seconds,
            trunk_seconds=wire.trunk_compute_seconds,
            wire_seconds=wire.wire_seconds,
            bytes_sent=wire.bytes_sent,
            bytes_received=wire.bytes_received,
        )


def causal_lm_loss(
    model: PreTrainedModel, batch: Batch, denominator: int, device: torch.device
) -> Tensor:
    """The summed token loss of ``batch`` over ``denominator``, by the model's own loss function."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    loss: Tensor = model.loss_function(
        logits=logits,
        labels=batch["labels"].to(device),
        vocab_size=logits.shape[-1],
        num_items_in_batch=denominator,
    )
    return loss


def count_label_tokens(batch: Batch) -> int:
    """Label tokens after the causal shift.

    Raises:
        DataError: There is none, so the micro-batch has no loss.
    """
    count = int((batch["labels"][:, 1:] != -100).sum())
    if count == 0:
        raise DataError(
            "a micro-batch holds no label token, so it has no loss: every label is -100. Raise "
            "train.sequence-length, or leave out examples whose completion is cut off."
        )
    return count


def micro_batch_seed(seed: int, place: RoundPlace, step: int, index: int) -> int:
    """The seed of a micro-batch's dropout masks; the same in every run and attempt."""
    name = f"{seed}/{place.partition_id}/{place.server_round}/{step}/{index}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")


class AuxiliaryHead:
    """A local loss for the bottom in mode forward-only, where no gradient comes back to it.

    The smashed data, layer-normalised, is decoded by the model's own frozen output embedding; its
    token loss trains the bottom and nothing else. It has no parameters of its own, so nothing of
    it needs to be aggregated. (Local losses in split federated learning: Han et al., "Accelerating
    Federated Learning with Split Learning on Locally Generated Losses", ICML 2021 workshop.)

    Args:
        model: The client's model.
        trunk: Its trunk; what reaches it is the smashed data.

    Raises:
        FlowerSplitError: The model has no output embedding.
    """

    def __init__(self, model: PreTrainedModel, trunk: MicroBatchTrunk) -> None:
        embedding = output_embeddings(model)
        if embedding is None:
            raise FlowerSplitError(
                f"train.auxiliary-head needs an output embedding, and {type(model).__name__} has none. "
                "Set train.auxiliary-head = false."
            )
        self._decode = embedding
        self._model = model
        self._smashed: dict[int, Tensor] = {}
        trunk.register_forward_pre_hook(self._capture)

    def _capture(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._smashed[threading.get_ident()] = args[0]

    def loss(self, batch: Batch, denominator: int) -> Tensor:
        """The local token loss of the forward that this thread ran last."""
        smashed = self._smashed.pop(threading.get_ident())
        logits = self._decode(functional.layer_norm(smashed, smashed.shape[-1:]))
        loss: Tensor = self._model.loss_function(
            logits=logits,
            labels=batch["labels"].to(logits.device),
            vocab_size=logits.shape[-1],
            num_items_in_batch=denominator,
        )
        return loss


@torch.no_grad()
def evaluate(model: PreTrainedModel, batches: Iterable[Batch], device: torch.device) -> EvalResult:
    """The held-out loss of ``model`` over ``batches``.

    Raises:
        DataError: There is no batch.
        TrunkError: The trunk refused or did not answer in time.
    """
    model.train(False)
    loss_sum, num_tokens, num_examples = 0.0, 0, 0
    for batch in batches:
        loss_sum += float(causal_lm_loss(model, batch, 1, device))
        num_tokens += count_label_tokens(batch)
        num_examples += len(batch["input_ids"])
    if num_tokens == 0:
        raise DataError("there is no held-out batch to evaluate on. Raise data.eval-fraction.")
    return EvalResult(loss_sum, num_tokens, num_examples)
