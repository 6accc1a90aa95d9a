"""Micro-batch k of all clients of a window as one forward and one backward.

The clients' rows of ``trunk_output_grad`` are scaled by their loss denominators before the one
backward, so that the parameters' gradient is ``Σ d g`` already, and the rows of ``smashed_grad`` are
scaled back. With equal denominators nothing is scaled. Where a joint pass fails, or gives NaN, every
client's rows are computed alone: who is at fault is named, and nobody else loses anything.

Shapes: hidden states ``[rows, positions, hidden]``.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flower_split.errors import TrunkRefused
from flower_split.split import CutLayers
from flower_split.trunk.compute.activations import Activation
from flower_split.trunk.compute.checks import check_finite, largest_magnitude
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.joining import Part, Rows, joined, passes_of, rows_of

logger = logging.getLogger(__name__)

# Denominators of one pass may be so far apart: beyond, scaled rows would leave the dtype's range.
_MAX_SCALE = {torch.float16: 2.0**8}
_MAX_SCALE_OTHERWISE = 2.0**40


@dataclass(eq=False, slots=True)
class JointPass:
    """One pass between its forward and the step of its window."""

    cuts: CutLayers | None
    rows: tuple[Rows, ...]
    activation: Activation
    grad: Tensor | None = None  # of its output; None: it has had no backward
    unit: float = 1.0  # the denominator that counts as 1 in ``grad``, whose rows are scaled by it
    apart: dict[int, float] = field(default_factory=dict)  # not scaled: slot -> its denominator

    def shape_of(self, slot: int) -> tuple[int, int, int]:
        """Return the shape of what ``slot``, which is in it, sent."""
        rows = next(rows for rows in self.rows if rows.slot == slot)
        return (rows.count, rows.positions, self.activation.hidden.shape[-1])

    def shares(self) -> dict[int, float]:
        """Return each slot's part of the pass, by its positions."""
        total = sum(rows.count * rows.positions for rows in self.rows)
        return {rows.slot: rows.count * rows.positions / total for rows in self.rows}


@dataclass(slots=True)
class Forwarded:
    """A batch after its forward."""

    passes: list[JointPass] = field(default_factory=list)
    outputs: dict[int, Tensor] = field(default_factory=dict)  # slot -> ``trunk_output``
    failures: dict[int, Exception] = field(default_factory=dict)  # slot -> why it has none


@dataclass(frozen=True, slots=True)
class Given:
    """What a slot gives to a backward."""

    grad: Tensor  # ``trunk_output_grad``
    denominator: float  # what the client divided its summed token loss by


@dataclass(slots=True)
class PassGradient:
    """What a pass adds to the window's gradient: ``unit`` times ``gradients`` is ``Σ d g``."""

    cuts: CutLayers | None
    unit: float
    gradients: list[Tensor | None]  # by parameter


@dataclass(slots=True)
class Backwarded:
    """A batch after its backward."""

    gradients: list[PassGradient] = field(default_factory=list)
    smashed_grads: dict[int, Tensor] = field(default_factory=dict)
    failures: dict[int, Exception] = field(default_factory=dict)
    norms_squared: dict[int, float] = field(default_factory=dict)  # of d · smashed_grad, by slot


class JointCompute:
    """Joint passes of a trunk. One thread at a time calls it.

    Args:
        compute: The trunk module.
        takes_mask: Whether its model takes a padding mask.
        max_positions: Rows times positions of a pass.
    """

    def __init__(self, compute: TrunkCompute, *, takes_mask: bool, max_positions: int) -> None:
        self._compute = compute
        self._takes_mask = takes_mask
        self._max_positions = max_positions

    def forward(
        self, parts: Sequence[Part], seed_of: str, keep: Callable[[JointPass], None]
    ) -> Forwarded:
        """Run the micro-batches of one place in the window, and keep what the backward needs.

        Args:
            parts: One per slot, in any order.
            seed_of: Names the batch for its dropout masks: the same name and parts, the same masks.
            keep: Called after every pass: it may take the graph away before the next one is made.
        """
        result = Forwarded()
        if self._compute.device.type == "cuda":  # elsewhere each was looked at when it came
            hidden = {part.slot: part.hidden for part in parts}
            result.failures |= _not_finite(hidden, "hidden_states (the smashed data)")
            parts = [part for part in parts if part.slot not in result.failures]
        groups = passes_of(parts, takes_mask=self._takes_mask, max_positions=self._max_positions)
        for group in groups:
            name = f"{seed_of}/{group[0].slot}"
            try:
                keep(self._forward(group, name, result))
            except Exception as error:
                if len(group) == 1:
                    result.failures[group[0].slot] = error
                    continue
                logger.warning("slots %s are computed one by one: %s", _slots(group), error)
                for part in group:
                    try:
                        keep(self._forward([part], f"{seed_of}/{part.slot}", result))
                    except Exception as own:
                        result.failures[part.slot] = own
        if self._compute.device.type == "cuda":  # other threads read on streams of their own
            torch.cuda.current_stream(self._compute.device).synchronize()
        return result

    def _forward(self, group: Sequence[Part], seed_of: str, result: Forwarded) -> JointPass:
        compute = self._compute
        output, activation = compute.forward_train(
            joined(group, compute.device, compute.dtype),
            seed_of=seed_of,
            use_cache=group[0].use_cache,
            cuts=group[0].cuts,
        )
        made = JointPass(group[0].cuts, rows_of(group), activation)
        result.passes.append(made)
        for rows in made.rows:
            result.outputs[rows.slot] = rows.of(output).to(rows.dtype)
        return made

    def backward(self, passes: Sequence[JointPass], given: Mapping[int, Given]) -> Backwarded:
        """Run the backward of a batch for the slots that give a gradient; the others' rows are 0."""
        result = Backwarded()
        if self._compute.device.type == "cuda":  # elsewhere each was looked at when it came
            grads = {slot: item.grad for slot, item in given.items()}
            result.failures |= _not_finite(grads, "trunk_output_grad")
            given = {slot: item for slot, item in given.items() if slot not in result.failures}
        for one in passes:
            slots = [rows.slot for rows in one.rows if rows.slot in given]
            if slots:
                self._backward(one, {slot: given[slot] for slot in slots}, result)
        if result.smashed_grads:
            norms = [
                torch.linalg.vector_norm(grad, dtype=torch.float64)
                for grad in result.smashed_grads.values()
            ]
            # On a GPU this waits: what is returned is complete.
            for slot, norm in zip(result.smashed_grads, torch.stack(norms).tolist(), strict=True):
                summed = norm * given[slot].denominator
                result.norms_squared[slot] = summed * summed  # may be infinite; ** would raise
        return result

    def again(self, one: JointPass, slots: set[int]) -> list[PassGradient]:
        """Return what ``slots`` alone give to a pass that has had its backward.

        The forward runs again at its full width with the same dropout masks, so the other rows, which
        get a gradient of 0, change nothing of theirs.
        """
        found = [rows.slot for rows in one.rows if rows.slot in slots]
        if one.grad is None or not found:
            return []
        sets = [{slot} for slot in found if slot in one.apart] if one.apart else [set(found)]
        made = []
        for chosen in sets:
            grad = one.grad.clone()
            for rows in one.rows:
                if rows.slot not in chosen:
                    rows.of(grad).zero_()
            _, gradients = self._compute.backward(one.activation, grad)
            unit = one.apart[min(chosen)] if one.apart else one.unit
            made.append(PassGradient(one.cuts, unit, gradients))
        return made

    def _backward(self, one: JointPass, given: Mapping[int, Given], result: Backwarded) -> None:
        unit = min(item.denominator for item in given.values())
        scales = {slot: item.denominator / unit for slot, item in given.items()}
        limit = _MAX_SCALE.get(self._compute.dtype, _MAX_SCALE_OTHERWISE)
        if not max(scales.values()) <= limit:
            logger.warning("the loss denominators of slots %s are too far apart", sorted(given))
            self._one_by_one(one, given, result)
            return
        one.unit, one.grad = unit, self._joined_grad(one, given, scales)
        try:
            smashed_grad, gradients = self._compute.backward(one.activation, one.grad)
        except Exception as error:
            logger.warning("slots %s are computed one by one: %s", sorted(given), error)
            self._one_by_one(one, given, result)
            return
        result.gradients.append(PassGradient(one.cuts, unit, gradients))
        for rows in one.rows:
            if rows.slot in given:
                scale, own = scales[rows.slot], rows.of(smashed_grad)
                back = own if scale == 1.0 else own / scale
                result.smashed_grads[rows.slot] = back.to(given[rows.slot].grad.dtype)

    def _one_by_one(self, one: JointPass, given: Mapping[int, Given], result: Backwarded) -> None:
        """Run the backward of each slot's rows by itself; who fails takes part no more."""
        one.grad = torch.zeros_like(one.activation.hidden, requires_grad=False)
        for rows in one.rows:
            if rows.slot not in given:
                continue
            slot, item = rows.slot, given[rows.slot]
            grad = self._joined_grad(one, {slot: item}, {slot: 1.0})
            one.activation.output = None  # a backward that failed may have left half a graph
            try:
                smashed_grad, gradients = self._compute.backward(one.activation, grad)
            except Exception as error:
                result.failures[slot] = error
                continue
            rows.of(one.grad).copy_(rows.of(grad))
            one.apart[slot] = item.denominator
            result.gradients.append(PassGradient(one.cuts, item.denominator, gradients))
            result.smashed_grads[slot] = rows.of(smashed_grad).to(item.grad.dtype)

    def _joined_grad(
        self, one: JointPass, given: Mapping[int, Given], scales: Mapping[int, float]
    ) -> Tensor:
        grad = torch.zeros_like(one.activation.hidden, requires_grad=False)
        for rows in one.rows:
            if rows.slot in given:
                own = given[rows.slot].grad.to(grad.device, grad.dtype)
                scale = scales[rows.slot]
                rows.of(grad).copy_(own if scale == 1.0 else own * scale)
        return grad


def _slots(group: Sequence[Part]) -> list[int]:
    return [part.slot for part in group]


def _not_finite(tensors: Mapping[int, Tensor], name: str) -> dict[int, TrunkRefused]:
    """Return the slots whose tensor holds NaN or Inf, each with its refusal; one look for all."""
    found: dict[int, TrunkRefused] = {}
    if math.isfinite(largest_magnitude(list(tensors.values()))):
        return found
    for slot, tensor in tensors.items():
        try:
            check_finite(f"slot {slot}: {name}", tensor)
        except TrunkRefused as refusal:
            found[slot] = refusal
    return found
