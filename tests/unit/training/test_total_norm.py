"""The norm over all entries, and clipping by it: torch's bits, on either way."""

import math

import pytest
import torch
from torch import Tensor, nn

from flower_split.training.optimizers import clip_by_norm, norm_of_norms, total_norm

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def tensors(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (1,), (64, 33), (0, 4), (2, 2, 2)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm_has_the_bits_of_torch(dtype: torch.dtype, norm_type: float, device: str) -> None:
    given = [tensor for tensor in tensors(device, dtype) if tensor.numel()]
    wanted = nn.utils.get_total_norm(given, norm_type)
    assert torch.equal(total_norm(given, norm_type), wanted)
    assert torch.equal(norm_of_norms(given, norm_type), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_norm_of_several_dtypes_has_the_bits_of_torch(device: str) -> None:
    given = [t for t in tensors(device) if t.numel()]
    mixed = [t.bfloat16() if index % 2 else t for index, t in enumerate(given)]
    for norm_type in (2.0, math.inf):
        wanted = nn.utils.get_total_norm(mixed, norm_type)
        assert torch.equal(norm_of_norms(mixed, norm_type), wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_is_in_the_norm(bad: float, device: str) -> None:
    given = [tensor for tensor in tensors(device) if tensor.numel()]
    given[2][63, 32] = bad
    assert not math.isfinite(total_norm(given, math.inf))
    assert not math.isfinite(norm_of_norms(given, math.inf))


def test_norm_of_nothing_is_zero() -> None:
    assert total_norm([]) == 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_has_the_bits_of_torch(max_norm: float, device: str) -> None:
    sets = []
    for clip in (clip_by_norm, nn.utils.clip_grad_norm_):
        parameters = [nn.Parameter(torch.zeros_like(tensor)) for tensor in tensors(device)]
        for parameter, gradient in zip(parameters, tensors(device), strict=True):
            parameter.grad = gradient
        parameters.append(nn.Parameter(torch.zeros(2, device=device)))  # has no gradient
        norm = clip(parameters, max_norm)
        sets.append([norm, *[p.grad for p in parameters if p.grad is not None]])
    assert all(map(torch.equal, *sets))
