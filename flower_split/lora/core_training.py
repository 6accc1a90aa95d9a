"""Train only the core R of B = P R, for methods that freeze both factors of LoRA.

Fed-SB: Singhal et al., arXiv 2502.15436. With P [out, r] and A [r, in] frozen the layer computes with
``ΔW = scale · P R A``, and the optimizer steps on R [r, r], which begins as Pᵀ B. By name P is
``<module>.core_P``, fp32, and travels beside the base change; afterwards B is P R again, so that the
adapter keeps PEFT's names and shapes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flower_split.errors import SplitError
from flower_split.lora.state import ADAPTER_NAME, lora_layers

CORE_COLUMNS = ".core_P"


def core_columns_state(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return P by module as named tensors, sorted.

    Args:
        columns: As ``AdapterAggregator.core_columns`` gives them.
    """
    return {module + CORE_COLUMNS: columns[module].contiguous() for module in sorted(columns)}


@contextmanager
def trained_cores(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Let every module that has a P in ``state`` train R instead of B; put B back at the end.

    Args:
        model: A model with LoRA attached, its adapter loaded, and B trainable.
        state: As :func:`core_columns_state` returns it; other names are left alone.

    Raises:
        SplitError: A module is not there, is no linear layer with LoRA, or P does not fit its B.
    """
    layers = dict(lora_layers(model))
    linears: list[tuple[nn.Linear, Tensor]] = []
    for name in sorted(state):
        if name.endswith(CORE_COLUMNS):
            module = name.removesuffix(CORE_COLUMNS)
            linear = _linear_b(layers.get(module), module)
            if linear.weight.shape != state[name].shape:
                raise SplitError(
                    f"{name} is {list(state[name].shape)}, but B of {module} is "
                    f"{list(linear.weight.shape)}; both come from the server's fed-sb. Give all "
                    "clients the rank of the run."
                )
            linears.append((linear, state[name].to(linear.weight)))
    for linear, columns in linears:
        parametrize.register_parametrization(linear, "weight", _TimesColumns(columns))
    try:
        yield
    finally:
        for linear, _ in linears:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


class _TimesColumns(nn.Module):
    """B as a function of R."""

    def __init__(self, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, core: Tensor) -> Tensor:
        """Return P R."""
        return cast(Tensor, self.columns) @ core

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return Pᵀ B, with which R begins."""
        return cast(Tensor, self.columns).T @ weight


def _linear_b(layer: LoraLayer | None, module: str) -> nn.Linear:
    """Return the linear layer that holds a module's B."""
    found = None
    if layer is not None and ADAPTER_NAME in layer.lora_B:
        found = layer.lora_B[ADAPTER_NAME]
    if not isinstance(found, nn.Linear):
        raise SplitError(
            f"fed-sb trains a core in linear layers with LoRA; {module} is none in this model. Use "
            'target-modules of linear layers, or another strategy.aggregator such as "product-delta".'
        )
    return found
