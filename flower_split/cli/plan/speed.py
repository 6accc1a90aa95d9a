"""How fast this machine computes: a probe of a second, by a block like those of the model."""

import time

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from torch.utils.flop_counter import FlopCounterMode

_SECONDS = 0.7  # of repetitions, after one that is not counted
_MOST_TOKENS = 4096  # of a probe


def probe_flops(
    tokens: int, hidden: int, intermediate: int, dtype: torch.dtype, threads: int
) -> float:
    """Return operations a second in forward and backward of a gated MLP whose weights are frozen.

    The norm, the activation and autograd's own work are in the time and not among the operations, as in
    a layer of a model.

    Args:
        tokens: Rows times positions of a micro-batch.
        hidden: Width of the hidden states.
        intermediate: Width of the MLP.
        dtype: Of weights and activations.
        threads: torch's, as ``train.num-threads``; set back afterwards.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        shape = min(tokens, _MOST_TOKENS), hidden
        given = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        block = _Block(hidden, intermediate).to(dtype).requires_grad_(False)
        with FlopCounterMode(display=False) as counted:
            block(given).sum().backward()
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < _SECONDS:
            block(given).sum().backward()
            count += 1
        return count * int(counted.get_total_flops()) / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)


class _Block(nn.Module):
    """A gated MLP behind a norm, as in most decoders."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(hidden, hidden.shape[-1:])
        made: torch.Tensor = self.down(silu(self.gate(normed)) * self.up(normed))
        return hidden + made
