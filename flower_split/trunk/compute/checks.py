"""What the trunk refuses before it computes anything: other inputs than its model's, NaN, wrong weights.

Which tensors a call may bring, the trunk's own model gave: names, dtypes, shapes, found out once at
the start (:mod:`flower_split.trunk.compute.schema_probe`). Every call is compared with them before
anything is computed, and tensors go on under the schema's own names, so that no text of a peer
reaches the model's code.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask ``[batch, seq]``; position ids
``[batch or 1, seq]``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import BackwardCall, ForwardCall, ForwardMode
from flower_split.training.optimizers import total_norm

HIDDEN, MASK, POSITIONS = "hidden_states", "attention_mask", "position_ids"
WHOLE = "host_argument/attention_mask"  # beside a key-value cache: over its positions as well
VISUAL = "host_argument/visual_pos_masks"  # which positions are of an image
FEATURES = "host_argument/deepstack_visual_embeds"  # what is added there, one entry per layer

Size = int | str  # a number, or "batch", "seq", "past+seq", "visual" (positions of images)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.bool)
_LONGEST_NAME = 80  # of a peer's name in a message


@dataclass(frozen=True, slots=True)
class Form:
    """One form that an input may have."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[Size, ...]

    def fits(self, tensor: Tensor, sizes: Mapping[str, int]) -> bool:
        """Return whether a tensor has this form, for a call of these sizes."""
        return (
            tensor.dtype in self.dtypes
            and tensor.ndim == len(self.shape)
            and all(
                have == (want if isinstance(want, int) else sizes[want])
                for have, want in zip(tensor.shape, self.shape, strict=True)
            )
        )

    def __str__(self) -> str:
        dtypes = "|".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"{dtypes} [{', '.join(str(size) for size in self.shape)}]"


Forms = Mapping[str, tuple[Form, ...]]


@dataclass(frozen=True, slots=True)
class InputSchema:
    """What one trunk takes.

    Args:
        hidden_size: Width of the hidden states.
        max_positions: Longest sequence, with what a key-value cache holds; None: no limit.
        max_position_id: Largest position id; None: no limit.
        plain: Inputs beside the hidden states, by name, of a call without a key-value cache.
        cached: The same for a call with one; None: the model takes no key-value cache.
        use_cache: Whether the model runs where it is told to use a key-value cache.
        kinds: Masks per kind of layer that must come where one of them comes.
    """

    hidden_size: int
    max_positions: int | None = None
    max_position_id: int | None = None
    plain: Forms = field(default_factory=dict)
    cached: Forms | None = field(default_factory=dict)
    use_cache: bool = True
    kinds: frozenset[str] = frozenset()

    def forward(self, call: ForwardCall, slot: int, *, look: bool = True) -> ForwardCall:
        """Return a forward with its tensors under the schema's names.

        Args:
            call: As its client sent it.
            slot: The client's.
            look: Whether to look for NaN and Inf in the hidden states; False: their batch does.

        Raises:
            TrunkRefused: It brings what the model does not take (INVALID_REQUEST), or NaN or Inf
                (NON_FINITE, which names the slot).
        """
        if call.cache is not None and call.mode is not ForwardMode.EVALUATE:
            raise _invalid("only an evaluation may keep a key-value cache.")
        past = None if call.cache is None else call.cache.past_length
        tensors = self.checked(call.tensors, past, call.use_cache)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not name.startswith(MASK):  # masks may hold Inf
                if look or name != HIDDEN:
                    what = "hidden_states (the smashed data)" if name == HIDDEN else name
                    check_finite(f"slot {slot}: {what}", tensor)
        return replace(call, tensors=tensors)

    def checked(
        self,
        tensors: Mapping[str, Tensor],
        past: int | None = None,
        use_cache: bool | None = None,
    ) -> dict[str, Tensor]:
        """Return the tensors under the schema's own names, once everything fits.

        Args:
            tensors: A call's tensors, by the names that its peer chose.
            past: Positions in the key-value cache that it goes on from; None: it has none.
            use_cache: As the model's argument.

        Raises:
            TrunkRefused: A tensor is missing, unknown, or of another form (INVALID_REQUEST).
        """
        hidden = self._hidden_states(tensors)
        table = self.plain if past is None else self.cached
        if table is None or (use_cache and not self.use_cache):
            raise _invalid(
                "this trunk's model uses no key-value cache; call it with use_cache=False."
            )
        batch, seq = hidden.shape[:2]
        self._check_positions(seq, past or 0)
        # Image features belong to the positions that the mask beside them names.
        visual = tensors.get(VISUAL)
        has_mask = visual is not None and visual.dtype == torch.bool
        sizes = {
            "batch": batch,
            "seq": seq,
            "past+seq": seq + (past or 0),
            "visual": int(visual.sum()) if has_mask and visual is not None else 0,
        }
        # Names of the table, each in its order: what a peer calls a tensor goes no further.
        found = {name: tensors[name] for name in table if name in tensors}
        unknown = tensors.keys() - found.keys() - {HIDDEN}
        if unknown:
            raise self._refusal(min(unknown), tensors[min(unknown)], hidden, ())
        for name, tensor in found.items():
            if not any(form.fits(tensor, sizes) for form in table[name]):
                raise self._refusal(name, tensor, hidden, table[name])
            self._check_values(name, tensor)
        self._check_masks(found)
        _check_features(found)
        return {HIDDEN: hidden, **found}

    def check_backward(self, call: BackwardCall, slot: int, *, look: bool = True) -> None:
        """Check what a backward brings; that it fits its forward is checked with that.

        Args:
            call: As its client sent it.
            slot: The client's.
            look: Whether to look for NaN and Inf; False: its batch does.

        Raises:
            TrunkRefused: The gradient has another form, or the weights are none that so many positions
                can have (INVALID_REQUEST); or the gradient holds NaN or Inf (NON_FINITE). Both name
                the slot.
        """
        grad = call.grad
        if grad.ndim != 3 or grad.shape[-1] != self.hidden_size or grad.dtype not in FLOATS:
            dtype = str(grad.dtype).removeprefix("torch.")
            raise _invalid(
                f"trunk_output_grad must be floating-point [batch, seq, {self.hidden_size}]; it is "
                f"{dtype} of shape {tuple(grad.shape)}."
            )
        check_weights(grad.shape, call.num_tokens, call.loss_denominator, slot)
        if look:
            check_finite(f"slot {slot}: trunk_output_grad", grad)

    def _hidden_states(self, tensors: Mapping[str, Tensor]) -> Tensor:
        hidden = tensors.get(HIDDEN)
        if (
            hidden is not None
            and hidden.ndim == 3
            and hidden.shape[-1] == self.hidden_size
            and hidden.dtype in FLOATS
            and hidden.numel() > 0
        ):
            return hidden
        got = "missing" if hidden is None else f"{hidden.dtype} of shape {tuple(hidden.shape)}"
        raise _invalid(
            f"hidden_states must be floating-point [batch, seq, {self.hidden_size}] and not empty; "
            f"it is {got}."
        )

    def _check_positions(self, seq: int, past: int) -> None:
        if self.max_positions is not None and not 0 <= past <= self.max_positions - seq:
            raise _invalid(
                f"a sequence may have the {self.max_positions} positions that the trunk's model has "
                f"(max_position_embeddings in its config.json); this one has {seq} after {past}. "
                "Lower train.sequence-length, or generate fewer tokens."
            )

    def _check_values(self, name: str, tensor: Tensor) -> None:
        """Check numbers that the model's code would use as indices."""
        if name == MASK and tensor.ndim == 2:
            low, high = 0.0, 1.0
        elif name == POSITIONS:
            low, high = 0.0, float(self.max_position_id or 2**31 - 1)
        else:
            return
        least, most = (float(value) for value in torch.aminmax(tensor))
        if not (low <= least and most <= high):  # NaN is neither
            raise _invalid(
                f"{name} must hold numbers from {low:g} to {high:g}; it holds {least:g} to {most:g}."
            )

    def _check_masks(self, found: Mapping[str, Tensor]) -> None:
        """Check that there is one mask, or one for every kind of layer."""
        for prefix, kinds in (
            (MASK, self.kinds),
            (WHOLE, {f"{WHOLE}.{kind.partition('/')[2]}" for kind in self.kinds}),
        ):
            several = {name for name in found if name.startswith((f"{prefix}/", f"{prefix}."))}
            missing = kinds - found.keys() if several else frozenset()
            if missing:
                raise _invalid(
                    f"masks per kind of layer must come for every kind; {min(missing)} is missing."
                )
            if several and prefix in found:
                raise _invalid(
                    f"a call has one {prefix}, or one per kind of layer; this one has both."
                )

    def _refusal(
        self, name: str, tensor: Tensor, hidden: Tensor, forms: tuple[Form, ...]
    ) -> TrunkRefused:
        dtype = str(tensor.dtype).removeprefix("torch.")
        wanted = "; or ".join(str(form) for form in forms)
        return _invalid(
            f"{printable(name)} of shape {tuple(tensor.shape)} and {dtype} does not belong to "
            f"hidden_states of shape {tuple(hidden.shape)}: this trunk's model takes "
            + (f"it as {wanted}." if forms else "no such tensor.")
        )


def _check_features(found: Mapping[str, Tensor]) -> None:
    """Check that features of images come with the mask of their positions, and in order."""
    places = {name for name in found if name.startswith(f"{FEATURES}.")}
    numbered = {f"{FEATURES}.{index}" for index in range(len(places))}
    if (VISUAL in found) != bool(places) or places != numbered:
        raise _invalid(f"{VISUAL} comes with {FEATURES}.0, .1 and so on, or not at all.")


def printable(name: str) -> str:
    """Return a peer's name for a message or a log line: short, and nothing but plain characters."""
    return re.sub(r"[^\x20-\x7e]", "?", name)[:_LONGEST_NAME]


def _invalid(message: str) -> TrunkRefused:
    return TrunkRefused(RefusalReason.INVALID_REQUEST, message)


def check_weights(
    shape: Sequence[int], num_tokens: float, loss_denominator: float, slot: int
) -> None:
    """Refuse a weight that the micro-batch cannot have; the numbers are the client's word."""
    positions = shape[0] * shape[1]
    if not 0 < num_tokens <= positions:
        raise TrunkRefused(
            RefusalReason.INVALID_REQUEST,
            f"num_tokens must be above 0 and at most batch x seq = {positions}; slot {slot} says "
            f"{num_tokens}.",
        )
    if not (loss_denominator > 0 and math.isfinite(loss_denominator)):
        raise TrunkRefused(
            RefusalReason.INVALID_REQUEST,
            f"loss_denominator must be finite and above 0; slot {slot} says {loss_denominator}.",
        )


@torch.no_grad()
def largest_magnitude(tensors: Sequence[Tensor]) -> float:
    """Return the largest magnitude, exact in the tensors' own dtypes; on a GPU this is one wait.

    On the CPU the extremes say it: ``torch.isfinite`` takes 150 ms for 33 MB of 16-bit entries.

    Args:
        tensors: Floating-point, of any devices; empty ones count for nothing.

    Returns:
        0 where there is no entry; NaN where one holds NaN.
    """
    held = [tensor for tensor in tensors if tensor.numel()]
    if {tensor.device.type for tensor in held} - {"cpu"}:
        return float(total_norm(held, math.inf))
    largest = 0.0
    for tensor in held:
        low, high = torch.aminmax(tensor)  # NaN in, NaN out
        if math.isnan(low):
            return math.nan
        largest = max(largest, -float(low), float(high))
    return largest


def check_finite(what: str, tensor: Tensor) -> None:
    """Refuse NaN and Inf."""
    if not math.isfinite(largest_magnitude([tensor])):
        raise TrunkRefused(
            RefusalReason.NON_FINITE,
            f"{what} holds NaN or Inf, and nothing of it was used. Lower the learning rate, clip the "
            "gradients, or look at the client's data.",
        )


def check_all_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check each as :func:`check_finite` does, by name, looking once: on a GPU a look is a wait."""
    if not math.isfinite(largest_magnitude(list(tensors.values()))):
        for what, tensor in tensors.items():
            check_finite(what, tensor)


def check_bounded(what: str, tensors: Mapping[str, Tensor], limit: float = math.inf) -> None:
    """Check that every entry is finite and at most ``limit``; on a GPU this is one wait.

    Args:
        what: Names the tensors in the message.
        tensors: By name.
        limit: Largest magnitude that an entry may have.

    Raises:
        TrunkRefused: One is not (NON_FINITE).
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.dtype.is_floating_point}
    if _is_bounded(largest_magnitude(list(floats.values())), limit):
        return
    for name, tensor in floats.items():
        largest = largest_magnitude([tensor])
        if not _is_bounded(largest, limit):
            raise TrunkRefused(
                RefusalReason.NON_FINITE,
                f"{what} {name} has an entry of magnitude {largest:g}; it must be finite and at most "
                f"{limit:g}. Nothing of the round is kept. Lower trunk.optimizer.learning-rate, or "
                "set trunk.max-client-grad-norm.",
            )


def _is_bounded(largest: float, limit: float) -> bool:
    return math.isfinite(largest) and largest <= limit
