"""The trunk's arithmetic: forward, backward, optimizer step, snapshot. One thread at a time calls it.

Shapes: hidden states ``[batch, seq, hidden]``, padding mask ``[batch, seq]``, position ids
``[batch or 1, seq]``.

Next: ``flower_split/server/trunk_strategy.py``.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flower_split.config import OptimizerConfig
from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.lora import adapter_name
from flower_split.runtime import failpoints
from flower_split.split import CutLayers, TrunkModel
from flower_split.split.structure.quantization import float_dtype
from flower_split.split.structure.stack import address_of
from flower_split.split.trunk_side.model import TrunkInputs
from flower_split.training.optimizers import LearningRate, clip_by_norm, make_optimizer
from flower_split.trunk.compute.activations import Activation
from flower_split.trunk.compute.checks import check_all_finite, check_bounded, check_finite
from flower_split.trunk.compute.clipping import Beside, Clipping, clip_together
from flower_split.trunk.compute.fair_device import DeviceShare
from flower_split.trunk.compute.gradients import MAX_ENTRY
from flower_split.trunk.compute.passes import Pass
from flower_split.trunk.compute.spans import Spans
from flower_split.trunk.compute.weight_versions import ParameterSlots, Weights
from flower_split.trunk.compute.weights_state import (
    Snapshot,
    checkpoint_tensors,
    load_checkpoint_tensors,
)


class TrunkCompute:
    """The trunk module with its optimizer.

    Args:
        trunk: Called as ``trunk(hidden_states, attention_mask=..., position_ids=...)``. Its
            parameters that require grad are trained; none: the trunk is frozen.
        optimizer: Optimizer, schedule and clipping.
        seed: Seeds the dropout masks.
        fused: Whether the optimizer steps in one kernel, with other last bits.
        share: Its share of a device that other experiments' trunks use; None: this one is alone.
    """

    def __init__(
        self,
        trunk: nn.Module,
        optimizer: OptimizerConfig,
        *,
        seed: int,
        fused: bool = False,
        share: DeviceShare | None = None,
    ) -> None:
        self.trunk, self.share = trunk, share
        self.seed, self.version = seed, 0
        self.named = sorted(
            (name, parameter)
            for name, parameter in trunk.named_parameters()
            if parameter.requires_grad
        )
        self.parameters = [parameter for _, parameter in self.named]
        first = next(trunk.parameters())
        self.device, self.dtype = first.device, float_dtype(trunk)
        devices = {parameter.device for parameter in trunk.parameters()}
        self._cuda = [device for device in devices if device.type == "cuda"]
        trunk.train(False)  # all of it alike, so that one flag says how all of it is
        self.spans = Spans(trunk, self.device, self.dtype)
        self._slots = ParameterSlots(trunk, self.parameters)
        self._config = optimizer
        self._optimizer = (
            make_optimizer(self.parameters, optimizer, fused=fused) if self.parameters else None
        )
        self._rate = LearningRate(optimizer, 1)
        addresses = {address_of(parameter) for parameter in trunk.parameters()}
        self._storages: Set[int] = getattr(trunk, "storages", addresses)

    def aside(self) -> AbstractContextManager[None]:
        """Return the block inside a turn in which other trunks may compute."""
        return nullcontext() if self.share is None else self.share.aside()

    def plan(self, total_steps: int) -> None:
        """Place the learning-rate schedule over ``total_steps`` optimizer steps of the whole run."""
        self._rate = LearningRate(self._config, total_steps)

    def forward(
        self,
        tensors: Mapping[str, Tensor],
        *,
        train: bool,
        seed_of: str,
        use_cache: bool | None = None,
        cuts: CutLayers | None = None,
    ) -> Tensor:
        """Return ``trunk_output`` without a graph.

        Args:
            tensors: ``hidden_states``, and the names of ``TrunkInputs``.
            train: Dropout as in training.
            seed_of: Names the micro-batch; the same name gives the same dropout mask.
            use_cache: As the model's own argument; nothing outlives the call.
            cuts: The client's, which :attr:`spans` has admitted; None: the trunk's.
        """
        hidden = tensors["hidden_states"]
        one = Pass(tensors, seed_of if train else "", use_cache, cuts)
        with torch.no_grad():
            output = self._run(one, hidden.to(self.device, self.dtype)).to(hidden.dtype)
        check_finite("trunk_output", output)  # waits: what is returned is complete
        return output

    def forward_train(
        self,
        tensors: Mapping[str, Tensor],
        *,
        seed_of: str,
        use_cache: bool | None = None,
        cuts: CutLayers | None = None,
        weights: Weights | None = None,
    ) -> tuple[Tensor, Activation]:
        """Return ``trunk_output`` and what its backward needs.

        Args:
            tensors: As in :meth:`forward`.
            seed_of: As in :meth:`forward`.
            use_cache: As in :meth:`forward`.
            cuts: As in :meth:`forward`.
            weights: Compute with these instead of the trunk's own; the backward does too, and
                returns gradients by them.
        """
        smashed = tensors["hidden_states"]
        extras = {name: tensor for name, tensor in tensors.items() if name != "hidden_states"}
        one = Pass(extras, seed_of, use_cache, cuts, weights)
        leaf = smashed.to(self.device, self.dtype).requires_grad_()
        known = self._storages | weights.storages if weights else self._storages
        saved = _SavedBytes(known)
        with torch.enable_grad(), saved.hooks:
            output = self._run(one, leaf)
        returned = output.detach().to(smashed.dtype)
        check_finite("trunk_output", returned)
        activation = Activation(
            version=weights.version if weights else self.version,
            num_bytes=max(saved.num_bytes, leaf.nbytes),
            hidden=leaf,
            output=output,
            recompute=partial(self._run, one),
            parameters=weights.parameters if weights else None,
        )
        return returned, activation

    def backward(
        self, activation: Activation, trunk_output_grad: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return ``smashed_grad`` and the gradient of every trainable parameter; ``.grad`` stays.

        Raises:
            TrunkRefused: The shapes differ (INVALID_REQUEST), or a gradient is not finite.
        """
        if trunk_output_grad.shape != activation.hidden.shape:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"trunk_output_grad has shape {tuple(trunk_output_grad.shape)}; the forward's output "
                f"has {tuple(activation.hidden.shape)}.",
            )
        leaf, output = activation.hidden, activation.output
        parameters = self.parameters if activation.parameters is None else activation.parameters
        with torch.enable_grad():
            if output is None:
                leaf = leaf.detach().requires_grad_()
                output = activation.recompute(leaf)
            smashed_grad, *gradients = torch.autograd.grad(
                output,
                [leaf, *parameters],
                trunk_output_grad.to(output.device, output.dtype),
                allow_unused=True,
            )
        activation.output = None  # its graph is used up: a backward that is tried again, recomputes
        smashed_grad = smashed_grad.to(trunk_output_grad.dtype)
        computed = {"smashed_grad": smashed_grad}
        for (name, _), gradient in zip(self.named, gradients, strict=True):
            if gradient is not None:
                computed[f"the gradient of {name}"] = gradient
        check_all_finite(computed)
        return smashed_grad, list(gradients)

    def covers(self, cuts: CutLayers) -> tuple[bool, ...] | None:
        """Return which of ``self.parameters`` a client's calls pass through; None: all."""
        return self.spans.covers(cuts, [name for name, _ in self.named])

    def step(self, gradients: Sequence[Tensor | None], beside: Beside | None = None) -> Clipping:
        """Take one optimizer step with ``gradients``, in the order of ``self.parameters``.

        A parameter whose gradient is None stays as it is, its moments and decay included.

        Args:
            gradients: The window's.
            beside: What else is clipped with them, by one norm; None: they are clipped alone.

        Returns:
            How the step was clipped; a norm of 0 and a factor of 1 where ``beside`` is None.

        Raises:
            TrunkRefused: The gradient, or a weight after the step, is not finite or is beyond all
                measure (NON_FINITE). After the step it has been taken: go back to a snapshot.
        """
        if self._optimizer is None:
            return Clipping()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None and gradient.dtype != parameter.dtype:
                gradient = gradient.to(parameter.dtype)
            parameter.grad = gradient
        given = {name: p.grad for name, p in self.named if p.grad is not None}
        self._rate.apply(self._optimizer, self.version)
        check_bounded("the reduced gradient of", given, MAX_ENTRY)
        clipping = Clipping()
        if beside is not None and beside.max_grad_norm > 0:
            clipping = clip_together(self.parameters, beside)
        elif self._config.max_grad_norm > 0:
            clip_by_norm(self.parameters, self._config.max_grad_norm)
        if failpoints.armed:
            failpoints.reach("trunk.step.before")
        self._optimizer.step()
        if failpoints.armed:
            failpoints.reach("trunk.step.after")
        self._optimizer.zero_grad(set_to_none=True)
        self.version += 1
        check_bounded("after the optimizer step, the weight", dict(self.named), MAX_ENTRY)
        return clipping

    def check_state(self) -> None:
        """Check all that a checkpoint would hold, before a round is promised to be kept.

        Raises:
            TrunkRefused: A weight or an optimizer moment is not finite (NON_FINITE).
        """
        check_bounded("the weight", dict(self.named), MAX_ENTRY)
        if self._optimizer is not None:
            for name, parameter in self.named:
                state = self._optimizer.state.get(parameter, {})
                moments = {k: v for k, v in state.items() if isinstance(v, Tensor)}
                check_bounded(f"the optimizer state of {name}:", moments)

    def snapshot(self) -> Snapshot:
        """Return a copy of the trainable state."""
        return Snapshot(
            self.version,
            [parameter.detach().clone() for parameter in self.parameters],
            copy.deepcopy(self._optimizer.state_dict()) if self._optimizer else {},
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to ``snapshot``."""
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, snapshot.parameters, strict=True):
                parameter.copy_(saved)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))
        self.version = snapshot.version

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all that a checkpoint needs: parameters and optimizer state, bit for bit."""
        return checkpoint_tensors(self.named, self._optimizer)

    def load_state_tensors(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Go to the state of :meth:`state_tensors`.

        Raises:
            TrunkRefused: It is of other parameters (NO_CHECKPOINT); nothing has changed.
        """
        load_checkpoint_tensors(self.named, self._optimizer, tensors)
        self.version = version

    def adapter(self) -> dict[str, Tensor]:
        """Return the trainable parameters as fp32 copies on the CPU, by the unsplit model's names."""
        return {
            adapter_name(name): parameter.detach().float().cpu().clone()
            for name, parameter in self.named
        }

    def digest(self) -> str:
        """Return the SHA-256 of the trainable parameters, in name order."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.adapter().items()):
            sha.update(name.encode())
            sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def _run(self, one: Pass, hidden: Tensor) -> Tensor:
        train = bool(one.seed_of)
        seed = _seed(self.seed, one.seed_of)
        given = TrunkInputs.of(one.extras, self.device)
        if self.trunk.training != train:  # a walk over thousands of modules
            self.trunk.train(train)
        options: dict[str, Any] = {}
        if isinstance(self.trunk, TrunkModel):
            options = {
                "use_cache": one.use_cache,
                "layer_arguments": given.layer_arguments,
                "host_arguments": given.host_arguments,
            }
        trunk = self.trunk if one.cuts is None else self.spans.of(one.cuts)
        own = nullcontext() if one.weights is None else self._slots.holding(one.weights)
        with own, torch.random.fork_rng(devices=self._cuda):
            if train:
                # As torch.manual_seed, which notes its caller's stack where CUDA has not been used.
                torch.default_generator.manual_seed(seed)
                for device in self._cuda:
                    with torch.cuda.device(device):
                        torch.cuda.manual_seed(seed)
            output: Tensor = trunk(
                hidden,
                attention_mask=given.attention_mask,
                position_ids=given.position_ids,
                **options,
            )
        return output


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")


class _SavedBytes:
    """Counts the bytes that autograd saves inside its ``hooks``, parameters excluded."""

    def __init__(self, parameters: Set[int]) -> None:
        self._parameters, self._seen = parameters, set[int]()
        self.num_bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if (address := storage.data_ptr()) not in self._seen and address not in self._parameters:
            self._seen.add(address)
            self.num_bytes += storage.nbytes()
        # Itself would be a cycle that only a backward ends: a node that saves its own output.
        return tensor.detach()


def _unpack(tensor: Tensor) -> Tensor:
    return tensor
