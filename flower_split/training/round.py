"""A client's local training: round → optimizer step → micro-batch.

Shapes: input ids, padding mask and labels ``[batch, seq]``; labels are −100 where there is no loss.

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
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.config import RunConfig
from flower_split.runtime.threads import pinned_pool
from flower_split.training.auxiliary_head import AuxiliaryHead
from flower_split.training.loss import Batch, count_labels, task_loss
from flower_split.training.measures import RoundPosition, StepMetrics, TrainResult
from flower_split.training.optimizers import PartOptimizer
from flower_split.training.step_end import end_step_together
from flower_split.training.trunk_protocol import CallStats, MicroBatchTrunk

logger = logging.getLogger(__name__)


def train_round(
    model: PreTrainedModel,
    batches: Iterator[Batch],
    config: RunConfig,
    position: RoundPosition,
    trunk: MicroBatchTrunk | None,
    proximal_mu: float = 0.0,
    optimizers: Sequence[PartOptimizer] = (),
) -> TrainResult:
    """Train the parameters of ``model`` that require grad for one round.

    Args:
        model: The client's model with ``trunk`` in its middle; or a whole model, without one.
        batches: Endless micro-batches.
        config: The run's configuration.
        position: Which round, and how many steps.
        trunk: The open remote trunk of this round; ``None``: nothing is remote.
        proximal_mu: FedProx's μ: every step's gradient gets μ (w − w₀), that of
            μ/2 ‖w − w₀‖², where w₀ are the weights that the round began with. The losses that are
            reported are without it. (Li et al., "Federated Optimization in Heterogeneous Networks",
            MLSys 2020.)
        optimizers: What steps with the gradients, kept over several rounds; none: a new optimizer of
            ``train.optimizer`` over all parameters, as a client has for each of its rounds.

    Raises:
        TrunkError: The trunk refused, aborted the round, or did not answer in time.
        DataError: A micro-batch has no label token.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = optimizers or [
        PartOptimizer(
            parameters,
            config.train.optimizer,
            position.total_steps,
            fused=config.train.compute == "fast",
        )
    ]
    for optimizer in optimizers:
        optimizer.forget_gradients()
    steps, num_examples, accumulate = [], 0, config.train.gradient_accumulation_steps
    at_once = min(config.train.micro_batches_in_flight, accumulate)
    with pinned_pool(at_once, "micro-batch") as pool:
        trainer = _StepTrainer(model, parameters, config, position, trunk, pool)
        if trunk is not None:  # one alone has nobody to give its turn to
            trunk.waiting = trainer.turns.waiting if at_once > 1 else nullcontext
        trainer.proximity = _Proximity(parameters, proximal_mu) if proximal_mu else None
        for step in range(position.num_steps):
            count = position.micro_batches_in(step, accumulate)
            micro_batches = [next(batches) for _ in range(count)]
            num_examples += sum(len(batch["labels"]) for batch in micro_batches)
            steps.append(trainer.step(step, micro_batches, optimizers))
            logger.debug(
                "partition=%d round=%d step=%d loss=%.4f",
                position.partition_id,
                position.server_round,
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
        position: RoundPosition,
        trunk: MicroBatchTrunk | None,
        pool: Executor,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.config = config
        self.position = position
        self.first_step = position.first_step
        self.trunk = trunk
        self.pool = pool
        self.device = next(iter(parameters)).device
        self.turns = ComputeTurns({parameter.device for parameter in model.parameters()})
        self.proximity: _Proximity | None = None
        self.num_micro_batches = 0  # of the steps that are done; they need not be equally long
        self.auxiliary = (
            AuxiliaryHead(model, trunk) if config.train.auxiliary_head and trunk else None
        )
        if trunk is not None:
            trunk.take_stats()

    def step(
        self, step: int, micro_batches: Sequence[Batch], optimizers: Sequence[PartOptimizer]
    ) -> StepMetrics:
        """Take one optimizer step over ``micro_batches``."""
        started = time.perf_counter()
        tokens = [count_labels(batch, self.config.model.task) for batch in micro_batches]
        losses = self._accumulate(step, micro_batches, tokens)
        self.num_micro_batches += len(micro_batches)
        if self.proximity is not None:
            self.proximity.add_gradient()
        whole_norm = self._clip_together(step, len(micro_batches))
        at = self.first_step + step
        taken = [optimizer.step(at, clip=whole_norm is None) for optimizer in optimizers]
        norms, rates = zip(*taken, strict=True)
        wire = CallStats() if self.trunk is None else self.trunk.take_stats()
        values = torch.stack([*losses, *norms]).tolist()  # on a GPU this waits: last, and once
        loss, part_norms = sum(values[: len(losses)]), values[len(losses) :]
        seconds = time.perf_counter() - started
        away = wire.wire_seconds + wire.trunk_queue_seconds + wire.trunk_compute_seconds
        return StepMetrics(
            step=step,
            loss=loss,
            num_tokens=sum(tokens),
            compute_seconds=max(0.0, seconds - away),
            wait_seconds=wire.trunk_queue_seconds,
            trunk_seconds=wire.trunk_compute_seconds,
            wire_seconds=wire.wire_seconds,
            bytes_sent=wire.bytes_sent,
            bytes_received=wire.bytes_received,
            gradient_bytes_sent=wire.gradient_bytes_sent,
            gradient_bytes_received=wire.gradient_bytes_received,
            learning_rate=rates[0],
            grad_norm=math.hypot(*part_norms) if whole_norm is None else whole_norm,
        )

    def _clip_together(self, step: int, num_micro_batches: int) -> float | None:
        """End the step with the other parties where the round says so: share ``.grad``, clip it.

        Returns:
            The norm over the whole model, by which ``.grad`` has been clipped; None: every part's
            optimizer clips its own.
        """
        if self.trunk is None:  # the whole model is here
            if not self.config.clips_over_model:
                return None
            most = self.config.train.optimizer.max_grad_norm
            return float(nn.utils.clip_grad_norm_(self.parameters, most))
        rule = self.trunk.finish
        if rule is None:
            return None
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        norm = end_step_together(self.trunk, rule, step, num_micro_batches, named)
        return norm if rule.max_grad_norm > 0 else None

    def _accumulate(
        self, step: int, micro_batches: Sequence[Batch], tokens: Sequence[int]
    ) -> list[Tensor]:
        """Set ``.grad`` to the step's gradient, summed in the order of the micro-batches.

        Returns:
            Each micro-batch's share of the step's loss, in their order.
        """

        def run(index: int) -> tuple[Tensor, list[Tensor | None]]:
            return self._micro_batch(step, index, micro_batches[index], tokens)

        losses = []
        for loss, gradients in self.pool.map(run, range(len(micro_batches))):
            losses.append(loss)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = (
                        gradient if parameter.grad is None else parameter.grad + gradient
                    )
        return losses

    def _micro_batch(
        self, step: int, index: int, batch: Batch, tokens: Sequence[int]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the micro-batch's share of the step's loss, and its gradients."""
        count, total = len(tokens), sum(tokens)
        window, micro_batch, last = step, index, index == count - 1
        if self.config.trunk.step_every == "server-round":
            window, micro_batch = 0, self.num_micro_batches + index
            last = last and step == self.position.num_steps - 1
        seed = micro_batch_seed(self.config.seed, self.position, step, index)
        with (
            self.turns.computing(seed),
            nullcontext()
            if self.trunk is None
            else self.trunk.micro_batch(
                window, micro_batch, num_tokens=tokens[index], loss_denominator=total, last=last
            ),
        ):
            loss = task_loss(self.model, batch, total, self.device, self.config.model.task)
            objective = loss if self.auxiliary is None else loss + self.auxiliary.loss(batch, total)
            # The trunk's own input makes autograd call it even where the bottom trains nothing.
            always = [self.trunk.always] if self.trunk is not None else []
            inputs = [*self.parameters, *always]
            gradients = torch.autograd.grad(objective, inputs, allow_unused=True)
        return loss.detach(), list(gradients[: len(self.parameters)])


class ComputeTurns:
    """Let one micro-batch of an optimizer step compute while others wait on the wire.

    Each micro-batch runs on its own thread. A lock lets one compute at a time and is given up while a
    micro-batch waits for the trunk; the random state goes with the micro-batch, so that dropout is the
    same however the waits fall.

    Args:
        devices: The client's model's; their generators are kept too.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cuda = sorted({d for d in devices if d.type == "cuda"}, key=str)
        self._lock = threading.Lock()
        self._holder: int | None = None  # thread id

    @contextmanager
    def computing(self, seed: int) -> Iterator[None]:
        """Compute one micro-batch, with random numbers from ``seed``."""
        self._acquire()
        outside = self._random_state()
        # As torch.manual_seed, which notes its caller's whole stack where CUDA has not been used: 0.4 ms.
        torch.default_generator.manual_seed(seed)
        for device in self._cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            self._set_random_state(outside)
            self._release()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let another micro-batch compute while this one waits on the wire.

        Called from a thread that does not hold the turn, as autograd's own threads do in a backward
        on CUDA, it changes nothing: they serve all micro-batches and must not wait for a turn.
        """
        if self._holder != threading.get_ident():
            yield
            return
        mine = self._random_state()
        self._release()
        try:
            yield
        finally:
            self._acquire()
            self._set_random_state(mine)

    def _acquire(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()

    def _release(self) -> None:
        self._holder = None
        self._lock.release()

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._cuda)]

    def _set_random_state(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state, device in zip(states[1:], self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


def micro_batch_seed(seed: int, position: RoundPosition, step: int, index: int) -> int:
    """Return the seed of a micro-batch's dropout masks; the same in every run and attempt."""
    name = f"{seed}/{position.partition_id}/{position.server_round}/{step}/{index}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
