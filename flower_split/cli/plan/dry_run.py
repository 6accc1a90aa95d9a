"""One micro-batch without numbers: the shapes of a real one, its live bytes and its operations.

The unsplit model with LoRA runs forward and backward on fake tensors, which have shapes and dtypes and
no storage. What is made between the two cut layers is the trunk's, the rest the client's.

Shapes: input ids and padding mask ``[batch, seq]``; labels ``[batch, seq]``, of a record's class
``[batch]``, of an answer's ends ``[batch, 2]``; hidden states ``[batch, seq, hidden]``.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from flower_split.config import RunConfig
from flower_split.config.model import (
    CAUSAL_LM,
    MASKED_LM,
    QUESTION_ANSWERING,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from flower_split.errors import ConfigError
from flower_split.lora import attach_lora, embedding_names, part_of, stack_of
from flower_split.parties.parts import model_cuts, trained_parts
from flower_split.split.loading.model_source import ModelSource
from flower_split.split.loading.parts import empty_model
from flower_split.training.loss import task_loss

CLIENT, TRUNK = "client", "trunk"
PLANNED = (CAUSAL_LM, MASKED_LM, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, QUESTION_ANSWERING)
"""The tasks whose micro-batches are one sequence of tokens, with labels, for each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRun:
    """One party's share of a micro-batch."""

    base_bytes: int  # of frozen weights
    trained_bytes: int  # of weights that train
    trained_values: int  # how many numbers those are
    waiting_bytes: int  # of activations between the party's forward and its backward
    peak_bytes: int  # of everything that is live at once in forward and backward
    flops: int  # floating-point operations, forward and backward


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """One micro-batch of one client."""

    parts: Mapping[str, PartRun]  # of CLIENT and TRUNK
    hidden_shape: tuple[int, ...]  # [batch, seq, hidden]; empty: nothing crosses a cut
    hidden_dtype: torch.dtype
    intermediate_size: int  # of a layer's MLP; as the model's configuration says
    trained: Mapping[str, tuple[int, ...]]  # the client's trained weights: name -> shape


def dry_run(config: RunConfig, *, whole: bool = False) -> DryRun:
    """Run one micro-batch of ``train.batch-size`` rows of ``train.sequence-length`` tokens.

    Args:
        config: The run's.
        whole: Whether the client has all of the model, and there is no trunk.

    Raises:
        SplitError: The model's configuration cannot be read, or the cut layers do not fit.
        ConfigError: The base is quantised (fake weights have no quantised form), or the task is none whose
            micro-batches are made here.
    """
    if config.model.task not in PLANNED:
        raise ConfigError(
            f"plan makes micro-batches of text in one sequence (model.task = {', '.join(PLANNED)}), and "
            f'this job\'s model.task is "{config.model.task}". Plan a model of the same size with one of '
            "these."
        )
    if config.model.quantization not in ("", "dequantize"):
        raise ConfigError(
            f"plan cannot tell the size of a base that is quantised ({config.model.quantization}). Plan "
            'with model.quantization = "", and take the saving off the base weights.'
        )
    model = empty_model(ModelSource.of(config.model))
    _set_dtype(model, getattr(torch, config.model.dtype))
    attach_lora(model, model_cuts(config), trained_parts(config), seed=config.seed)
    owners = _owners(config, model)
    if whole:
        owners = {CLIENT: {**owners[CLIENT], **owners[TRUNK]}, TRUNK: {}}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.train()
        watch = _Watch(forward_only=config.mode == "forward-only")
        watch.pass_over(model)
        hidden = [] if whole else watch.follow(config, model)
        batch = _batch(config)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with watch:
            count, task = batch["labels"].numel(), config.model.task
            loss = task_loss(model, batch, count, torch.device("cpu"), task)
            torch.autograd.grad(loss, trained, allow_unused=True)
    text = model.config.get_text_config(decoder=True)
    return DryRun(
        parts={name: watch.part(owners, name) for name in (CLIENT, TRUNK)},
        hidden_shape=tuple(hidden[0].shape) if hidden else (),
        hidden_dtype=hidden[0].dtype if hidden else loss.dtype,
        intermediate_size=int(getattr(text, "intermediate_size", 0) or 4 * text.hidden_size),
        trained={
            name: tuple(parameter.shape)
            for name, parameter in owners[CLIENT].items()
            if parameter.requires_grad
        },
    )


def _set_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model without weights those of the dtype that a run loads, before LoRA is attached."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _batch(config: RunConfig) -> dict[str, Tensor]:
    rows, positions = config.train.batch_size, config.train.sequence_length
    labels: dict[str, tuple[int, ...]] = {SEQUENCE_CLASSIFICATION: (), QUESTION_ANSWERING: (2,)}
    return {
        "input_ids": torch.zeros(rows, positions, dtype=torch.int64),
        "attention_mask": torch.ones(rows, positions, dtype=torch.int64),
        "labels": torch.zeros(
            rows, *labels.get(config.model.task, (positions,)), dtype=torch.int64
        ),
    }


def _owners(config: RunConfig, model: PreTrainedModel) -> dict[str, dict[str, nn.Parameter]]:
    """Return who holds which weight; a tied one counts once."""
    stack, cuts = stack_of(model), model_cuts(config)
    embeddings = frozenset(name.removesuffix(".base_layer") for name in embedding_names(model))
    found: dict[str, dict[str, nn.Parameter]] = {CLIENT: {}, TRUNK: {}}
    for name, parameter in model.named_parameters():
        module = name.split(".lora_", 1)[0] if ".lora_" in name else name.rpartition(".")[0]
        part = part_of(module.removesuffix(".base_layer"), stack, cuts, embeddings)
        found[TRUNK if part == "trunk" else CLIENT][name] = parameter
    return found


def _then(tensor: Tensor, do: Callable[[], None]) -> None:
    """Call ``do`` in the backward, when the gradient of ``tensor`` is there."""

    def hook(gradient: Tensor) -> None:
        do()

    tensor.register_hook(hook)  # type: ignore[no-untyped-call]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is live, and who made it.

    Args:
        forward_only: No gradient crosses the cuts.
    """

    def __init__(self, *, forward_only: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._forward_only = forward_only
        self._owner = CLIENT
        self._done = {CLIENT: 0, TRUNK: 0}  # owner -> operations
        self._live = {CLIENT: 0, TRUNK: 0}
        self._peak = {CLIENT: 0, TRUNK: 0}
        self._waiting = {CLIENT: 0, TRUNK: 0}
        self._seen: set[int] = set()
        # Held, so that none of their ids is used again.
        self._weights: list[torch.UntypedStorage] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] = MappingProxyType({}),
    ) -> object:
        """Run one operation; count its arithmetic, and note the memory of what it makes."""
        made: object = func(*args, **(kwargs or {}))
        operations = flop_registry.get(func._overloadpacket)
        if operations is not None:
            self._done[self._owner] += int(operations(*args, **(kwargs or {}), out_val=made))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def pass_over(self, model: PreTrainedModel) -> None:
        """Leave a model's weights and buffers out, of which operations make views."""
        self._weights = [
            tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())
        ]
        self._seen.update(map(id, self._weights))

    def follow(self, config: RunConfig, model: PreTrainedModel) -> list[Tensor]:
        """Have the layers at the cuts tell when the other party begins.

        Returns:
            Where the hidden states at the first cut layer will be.
        """
        cuts, layers = model_cuts(config), stack_of(model).layers(model)
        found: list[Tensor] = []

        def enter(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
        ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
            hidden, *rest = args
            self._waiting[CLIENT] = self._live[CLIENT]
            self.give(TRUNK)
            if self._forward_only:
                hidden = hidden.detach()
            elif hidden.requires_grad:
                _then(hidden, lambda: self.give(CLIENT))
            else:
                hidden = hidden.detach().requires_grad_()
            found.append(hidden)
            return (hidden, *rest), kwargs

        def leave(module: nn.Module, args: tuple[Tensor, ...], made: object) -> None:
            output = made[0] if isinstance(made, tuple) else made
            self.give(CLIENT)
            self._waiting[TRUNK] = self._live[TRUNK]
            if isinstance(output, Tensor) and output.requires_grad:
                _then(output, lambda: self.give(TRUNK))

        layers[cuts.first].register_forward_pre_hook(enter, with_kwargs=True)
        layers[cuts.second - 1].register_forward_hook(leave)
        return found

    def give(self, owner: str) -> None:
        """Let what follows be ``owner``'s."""
        self._owner = owner

    def part(self, owners: Mapping[str, Mapping[str, nn.Parameter]], name: str) -> PartRun:
        """Return one party's share."""
        weights = owners[name].values()
        trained = [weight for weight in weights if weight.requires_grad]
        return PartRun(
            base_bytes=sum(w.nbytes for w in weights if not w.requires_grad),
            trained_bytes=sum(w.nbytes for w in trained),
            trained_values=sum(w.numel() for w in trained),
            waiting_bytes=self._waiting[name],
            peak_bytes=self._peak[name],
            flops=self._done[name],
        )

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        self._seen.add(key)
        owner, size = self._owner, storage.nbytes()
        self._live[owner] += size
        self._peak[owner] = max(self._peak[owner], self._live[owner])
        weakref.finalize(storage, self._freed, key, owner, size)

    def _freed(self, key: int, owner: str, size: int) -> None:
        self._seen.discard(key)
        self._live[owner] -= size
