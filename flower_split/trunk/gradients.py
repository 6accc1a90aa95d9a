"""Token-weighted accumulation of the trunk's parameter gradients.

A client's loss for a micro-batch is its summed token loss over a denominator ``d`` of its choice: the
micro-batch's own label tokens, or those of the whole optimizer step. With ``g`` the gradient of that
loss, ``d · g`` is the gradient of the sum, and the step's gradient over everything is
``Σ d·g / Σ n`` with ``n`` the label tokens: invariant to how examples are spread over micro-batches
and clients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class SlotGradient:
    """One slot's gradient in one window, summed over its micro-batches in their order.

    The sum is kept in units of the first micro-batch's denominator, so that a single micro-batch, or
    several with one denominator, add exactly as ``loss.backward()`` would.
    """

    denominator: float = 0.0
    num_tokens: float = 0.0
    total: list[Tensor | None] = field(default_factory=list)  # fp32, per parameter
    _next: int = 0
    _waiting: dict[int, tuple[list[Tensor | None], float, float]] = field(default_factory=dict)

    def add(
        self,
        micro_batch: int,
        gradients: Sequence[Tensor | None],
        *,
        num_tokens: float,
        loss_denominator: float,
    ) -> None:
        """Add micro-batch ``micro_batch``; one that comes early waits for those before it."""
        fp32 = [None if g is None else g.detach().float() for g in gradients]
        self._waiting[micro_batch] = (fp32, num_tokens, loss_denominator)
        while self._next in self._waiting:
            self._fold(*self._waiting.pop(self._next))
            self._next += 1

    def _fold(self, gradients: list[Tensor | None], num_tokens: float, denominator: float) -> None:
        self.num_tokens += num_tokens
        if not self.total:
            self.denominator, self.total = denominator, gradients
            return
        scale = denominator / self.denominator
        self.total = [
            _sum(total, gradient, scale)
            for total, gradient in zip(self.total, gradients, strict=True)
        ]


def _sum(total: Tensor | None, gradient: Tensor | None, scale: float) -> Tensor | None:
    if gradient is None:
        return total
    scaled = gradient if scale == 1.0 else gradient * scale
    return scaled if total is None else total + scaled


def reduce_in_slot_order(slots: Mapping[int, SlotGradient]) -> list[Tensor | None]:
    """The window's gradient ``Σ nᵢ gᵢ / Σ nᵢ``, summed in slot order.

    Args:
        slots: Slot -> its gradient; ``num_tokens`` over all slots must be above 0.

    Returns:
        One fp32 tensor per parameter, or ``None`` where no slot has a gradient.
    """
    tokens = sum(slots[slot].num_tokens for slot in sorted(slots))
    result: list[Tensor | None] = [None] * len(next(iter(slots.values())).total)
    for slot in sorted(slots):
        weight = slots[slot].denominator / tokens
        result = [
            _sum(total, gradient, weight)
            for total, gradient in zip(result, slots[slot].total, strict=True)
        ]
    return result
