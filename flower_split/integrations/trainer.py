"""transformers' ``Trainer``, and every trainer built on it, over a remote trunk.

A client model trains under ``Trainer`` as it is; what a remote trunk needs beside the forward is to
be told which micro-batch of which optimizer step a forward belongs to. :func:`connect_trainer` tells
it, from what the trainer knows: three lines connect any trainer ::

    set_trunk(client, trunk)
    trainer = SFTTrainer(model=client, args=args, train_dataset=dataset)
    connect_trainer(trainer)

The trainer's loss is not touched, whatever it is. With ``gᵢ`` the gradient of micro-batch ``i`` of an
optimizer step and ``nᵢ`` its label tokens, the trunk is told the denominator ``Σ nᵢ`` for every one
of them. So alone it steps with ``Σ gᵢ``, as the trainer itself does, and with other clients in the
window it weighs them by their tokens.

In a round that clips by one norm over the whole model (``train.max-grad-norm-over``), the trainer's own
clipping ends the step together with the trunk: what ``max_grad_norm`` clips is then the norm over
bottom, trunk and top, as for the unsplit model, and ``grad_norm`` in the trainer's log is that norm.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import STEP_EVERY, OptimizerConfig
from flower_split.errors import ConfigError, SplitError, TrunkError
from flower_split.split import TrunkSlot
from flower_split.split.client_side.model import trunk_slot
from flower_split.training.optimizers import LearningRate, make_optimizer
from flower_split.training.step_end import end_step_together

logger = logging.getLogger(__name__)

Inputs = (
    dict[str, Any] | list[Any]
)  # what a collator makes: mostly tensors; or records, as of prompts


def connect_trainer(trainer: Trainer, *, step_every: str = "local-step") -> None:
    """Let ``trainer`` train its client model over the remote trunk that the model calls.

    When training begins, the trunk's session is opened for as many optimizer steps as the trainer
    will take, unless it is open already. A trainer that stops after fewer says so, and what it has
    done is kept. Closing the session stays the caller's.

    Args:
        trainer: Made around a client model whose trunk is a :class:`RemoteTrunk`.
        step_every: The trunk's own setting: ``local-step``, ``server-round`` or ``contribution``.

    Raises:
        SplitError: The model is not a client model, its trunk is not remote, or its reference model
            calls a remote trunk.
        ConfigError: ``step_every`` is unknown, or the trainer would use several devices at once.
    """
    if step_every not in STEP_EVERY:
        raise ConfigError(
            f"step_every must be one of {', '.join(STEP_EVERY)}; it is {step_every!r}."
        )
    assert trainer.model is not None
    slot = trunk_slot(trainer.model)
    _remote(slot)
    if trainer.args.n_gpu > 1 or trainer.args.world_size > 1:
        raise ConfigError(
            f"a client is one process on one device; this trainer uses {trainer.args.n_gpu} devices "
            f"in {trainer.args.world_size} processes. Make one device visible (CUDA_VISIBLE_DEVICES)."
        )
    reference = getattr(trainer, "ref_model", None)  # of TRL's preference trainers
    if isinstance(reference, nn.Module) and _calls_remote_trunk(reference):
        raise SplitError(
            "the trainer's reference model calls a remote trunk, whose LoRA a client cannot switch off: "
            "it would be the policy's own. Give it the whole base model as ref_model, or precompute the "
            "reference's log-probabilities (precompute_ref_log_probs) with that model."
        )
    slot.register_forward_pre_hook(_RefuseSwitchedOff(trainer.model))
    _Connection(trainer, slot, step_every)


class _RefuseSwitchedOff:
    """Before every call of the trunk: refuse one that leaves out the client's adapters, or has others.

    A preference trainer's reference policy is the model without its adapters (PEFT's
    ``disable_adapter``), or with others. The trunk's LoRA cannot be switched with them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        self._active = [list(layer.active_adapters) for layer in self._layers]

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        for layer, active in zip(self._layers, self._active, strict=True):
            if layer.disable_adapters or list(layer.active_adapters) != active:
                raise SplitError(
                    "the client's adapters are switched off, or others are on, as for a reference "
                    "policy, and the remote trunk's LoRA stays on: the result would be of neither "
                    "model. Give the trainer the whole base model as ref_model, or precompute the "
                    "reference's log-probabilities (precompute_ref_log_probs) with that model."
                )


def _calls_remote_trunk(model: nn.Module) -> bool:
    return any(
        isinstance(module, TrunkSlot) and isinstance(module.trunk, RemoteTrunk)
        for module in model.modules()
    )


def _remote(slot: TrunkSlot) -> RemoteTrunk:
    trunk = slot.trunk
    if isinstance(trunk, RemoteTrunk):
        return trunk
    raise SplitError(
        f"connect_trainer is for a client model whose trunk is remote; this one's is a "
        f"{type(trunk).__name__}. A trunk in process needs no connection: give the trainer "
        "LocalTrunkOptimizer as a callback."
    )


class _Connection(TrainerCallback):
    """Names every training forward of one trainer, through the trainer's own two steps.

    ``get_batch_samples`` tells which micro-batches make an optimizer step; ``training_step`` runs one
    of them; the accelerator's ``clip_grad_norm_`` comes after the last, whatever ``max_grad_norm`` is.
    """

    def __init__(self, trainer: Trainer, slot: TrunkSlot, step_every: str) -> None:
        self._slot = slot
        self._session = ""  # the one that training was begun with
        self._whole_round = step_every == "server-round"
        self._num_steps = self._first_step = 0  # of this round; of the trainer before it
        self._window = -1  # the optimizer step, from 0
        self._index = 0  # of the micro-batch in the window
        self._tokens: list[int] = []  # of the optimizer step's micro-batches
        self._done = 0  # of them
        self._get_batch_samples = trainer.get_batch_samples
        self._training_step = trainer.training_step
        self._trainer = trainer
        self._clip_own = trainer.accelerator.clip_grad_norm_
        # Instance attributes shadow the methods, of whichever class the trainer is.
        trainer.get_batch_samples = self._note_step  # type: ignore[method-assign]
        trainer.training_step = self._named_step  # type: ignore[method-assign]
        trainer.accelerator.clip_grad_norm_ = self._clip
        trainer.add_callback(self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Open the round: the number of optimizer steps is known now."""
        self._first_step = state.global_step
        self._num_steps = state.max_steps - state.global_step
        self._window, self._index = -1, 0
        trunk = _remote(self._slot)
        grant = trunk.grant or trunk.open(self._num_steps)
        if grant.session == self._session:
            raise TrunkError(
                "this trainer has trained in the trunk's round already, and a session's optimizer "
                "steps are counted once. Give the model a new RemoteTrunk for every round "
                "(set_trunk), then call train()."
            )
        self._session = grant.session
        rule = grant.finish
        if rule is not None and rule.max_grad_norm not in (0, args.max_grad_norm):
            raise ConfigError(
                f"this round clips by one norm over the whole model, to {rule.max_grad_norm:g}; the "
                f"trainer's max_grad_norm is {args.max_grad_norm}. Set it to the same in the "
                "trainer's arguments."
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Keep what was done where the trainer stops early: plan no more steps than those.

        It does so when a callback says so (``EarlyStoppingCallback``), or when its data ends.
        """
        done = state.global_step - self._first_step
        if 0 < done < self._num_steps:
            logger.info("the trainer stops after %d of %d steps", done, self._num_steps)
            _remote(self._slot).shorten_plan(done)

    def _note_step(
        self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], Tensor | int | None]:
        samples, num_items = self._get_batch_samples(epoch_iterator, num_batches, device)
        self._tokens, self._done = [_num_label_tokens(inputs) for inputs in samples], 0
        self._window += 1
        if not self._whole_round:
            self._index = 0
        return samples, num_items

    def _clip(
        self,
        parameters: Iterable[nn.Parameter],
        max_norm: float,
        norm_type: int | float = 2,
    ) -> Tensor | None:
        """Take the place of ``Accelerator.clip_grad_norm_``, which returns the norm before clipping."""
        trunk = _remote(self._slot)
        rule = trunk.finish
        model = self._trainer.model
        if rule is None or model is None:
            norm: Tensor | None = self._clip_own(parameters, max_norm, norm_type)
            return norm
        self._trainer.accelerator.unscale_gradients()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        total = end_step_together(trunk, rule, self._window, len(self._tokens), named)
        if rule.max_grad_norm > 0:
            return torch.tensor(total)
        norm = self._clip_own(parameters, max_norm, norm_type)
        return norm

    def _named_step(
        self,
        model: nn.Module,
        inputs: Inputs,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if isinstance(inputs, list) and not self._whole_round and self._window:
            # Texts are generated now, before the micro-batch's own forward says which step it needs.
            trunk = _remote(self._slot)
            assert trunk.grant is not None, "training has begun"
            trunk.wait_version(trunk.grant.version + self._window)
        last = self._done + 1 == len(self._tokens)
        if self._whole_round:
            last = last and self._window + 1 == self._num_steps
        with _remote(self._slot).micro_batch(
            0 if self._whole_round else self._window,
            self._index,
            num_tokens=self._tokens[self._done],
            loss_denominator=sum(self._tokens),
            last=last,
        ):
            loss = self._training_step(model, cast(dict[str, Any], inputs), num_items_in_batch)
        self._index += 1
        self._done += 1
        return loss


class LocalTrunkOptimizer(TrainerCallback):
    """Trains a trunk that runs in this process beside the trainer's model, as a trunk server would.

    The trunk steps once per optimizer step of the trainer, with its own optimizer, schedule and
    clipping.

    Args:
        trunk: The trunk; its parameters that require grad are trained.
        optimizer: Its settings. Its schedule spans the trainer's optimizer steps.
    """

    def __init__(self, trunk: nn.Module, optimizer: OptimizerConfig) -> None:
        self._config = optimizer
        self._parameters = [p for p in trunk.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(self._parameters, optimizer)
        self._rate = LearningRate(optimizer, 1)
        self._step = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Open the round: the number of optimizer steps is known now."""
        self._rate = LearningRate(self._config, state.max_steps)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Step the trunk, as the trainer steps its model now."""
        if self._config.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm)
        self._rate.apply(self._optimizer, self._step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1


def _num_label_tokens(inputs: Inputs) -> int:
    """Return what a micro-batch counts: its label tokens after the causal shift; at least 1.

    A micro-batch without any still takes part: its gradient is zero. Without labels ``[batch, seq]``
    it counts one per row.
    """
    if isinstance(inputs, list):
        return max(1, len(inputs))
    labels = inputs.get("shift_labels")
    if labels is None and isinstance(inputs.get("labels"), Tensor):
        labels = inputs["labels"]
        labels = labels[:, 1:] if labels.dim() == 2 else labels
    if isinstance(labels, Tensor):
        return max(1, int((labels != -100).sum()))
    tensors: Sequence[Tensor] = [v for v in inputs.values() if isinstance(v, Tensor) and v.dim()]
    return max(1, len(tensors[0])) if tensors else 1
