"""What the trunk refuses before it computes anything."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.parties.fingerprint import CUT_LAYERS
from flower_split.split.structure.trunk_inputs import fits


def check_fingerprint(
    mine: Mapping[str, str], theirs: Mapping[str, str], slot: int, *, own_cuts: bool = False
) -> None:
    """Refuse a client that does not hold parts of the same model, naming the fields that differ.

    Args:
        mine: The trunk's.
        theirs: The client's.
        slot: The client's.
        own_cuts: The client names its own cut layers, which are checked elsewhere: the run's need
            not be the trunk's.
    """
    differing = [
        f"{name} (trunk: {mine.get(name)}, client: {theirs.get(name)})"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name) and not (own_cuts and name == CUT_LAYERS)
    ]
    if differing:
        raise TrunkRefused(
            RefusalReason.FINGERPRINT_MISMATCH,
            f"slot {slot} and the trunk do not hold parts of the same model: they differ in "
            f"{'; '.join(differing)}. Give both the same run config and the same checkpoint.",
        )


def check_finite(what: str, tensor: Tensor) -> None:
    """Refuse NaN and Inf."""
    if not bool(torch.isfinite(tensor).all()):
        raise TrunkRefused(
            RefusalReason.NON_FINITE,
            f"{what} holds NaN or Inf, and nothing of it was used. Lower the learning rate, clip the "
            "gradients, or look at the client's data.",
        )


def check_all_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check each as :func:`check_finite` does, by name, looking once: on a GPU a look is a wait."""
    largest = nn.utils.get_total_norm(list(tensors.values()), norm_type=math.inf)
    if not bool(torch.isfinite(largest)):
        for what, tensor in tensors.items():
            check_finite(what, tensor)


def check_tensors(tensors: Mapping[str, Tensor], hidden_size: int) -> None:
    """Refuse hidden states, masks and positions that do not fit the model or each other."""
    hidden = tensors.get("hidden_states")
    if (
        hidden is None
        or hidden.ndim != 3
        or hidden.shape[-1] != hidden_size
        or not hidden.is_floating_point()
        or hidden.numel() == 0
    ):
        got = "missing" if hidden is None else f"{hidden.dtype} of shape {tuple(hidden.shape)}"
        raise TrunkRefused(
            RefusalReason.INVALID_REQUEST,
            f"hidden_states must be floating-point [batch, seq, {hidden_size}] and not empty; it is "
            f"{got}.",
        )
    batch, sequence = hidden.shape[:2]
    for name, tensor in tensors.items():
        if name != "hidden_states" and not fits(name, tensor, batch, sequence):
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"{name} of shape {tuple(tensor.shape)} does not belong to hidden_states of shape "
                f"{tuple(hidden.shape)}.",
            )
        if "_argument/" in name and tensor.is_floating_point():
            check_finite(name, tensor)
    check_finite("hidden_states (the smashed data)", hidden)


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
