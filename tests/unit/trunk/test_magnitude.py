"""The one pass that all finite checks make: exact, and blind to nothing."""

import math

import pytest
import torch

from flower_split.trunk.compute.checks import largest_magnitude

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_magnitude_of_either_sign_is_exact(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for extreme in (most, -most, 0.5, -0.5):
        tensor = torch.zeros(3, 70, dtype=dtype)
        tensor[2, 69] = extreme
        assert largest_magnitude([torch.ones(2, dtype=dtype) * 0.25, tensor]) == abs(extreme)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 137, 209])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_largest_magnitude_sees_one_bad_entry_anywhere(
    dtype: torch.dtype, place: int, bad: float
) -> None:
    tensor = torch.randn(210, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[place] = bad
    for order in ([tensor, torch.ones(5)], [torch.ones(5), tensor]):
        assert not math.isfinite(largest_magnitude(order))


def test_largest_magnitude_of_nothing_is_zero() -> None:
    assert largest_magnitude([]) == 0.0
    assert largest_magnitude([torch.empty(0, 4)]) == 0.0


def test_largest_magnitude_asks_for_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.tensor([-3.0, 2.0]))
    assert largest_magnitude([weight]) == 3.0
