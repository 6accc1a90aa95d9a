"""What an aggregation method adds to the clients' frozen base weights, carried beside them.

FLoRA and FedEx-LoRA put into the base what their adapters do not hold. A base in bf16 would swallow
most of it and a quantised one all of it, so the change stays a low-rank term of its own: a forward
hook adds it, computed in fp32, to what the base layer gives. It has no parameters, is in no state
dict, and a model without a change has no hook.

Shapes: ``ΔW = B @ A`` is [out, in] with A [r, in] and B [out, r]; that of an embedding is
[num_embeddings, dim]. By name the tensors are ``<module>.base_A`` and ``<module>.base_B``, fp32; the
rank differs by module, and a module that did not change has none.
"""

from collections.abc import Mapping
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from flower_split.aggregation.core.adapter_layout import factors_from, factors_into, layout_of
from flower_split.aggregation.core.factors import Factors
from flower_split.aggregation.core.lowrank import LowRankSum, factors_of
from flower_split.errors import SplitError
from flower_split.lora.core_training import CORE_COLUMNS

A_SUFFIX, B_SUFFIX = ".base_A", ".base_B"


def base_change_state(changes: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return changes by module as named tensors, sorted; the scale goes into B.

    Args:
        changes: As ``AdapterAggregator.base_changes`` gives them.
    """
    state: dict[str, Tensor] = {}
    for module, change in sorted(changes.items()):
        if change.rank:
            state[module + A_SUFFIX] = change.A.contiguous()
            scaled = change.B if change.scale == 1 else (change.B.double() * change.scale).float()
            state[module + B_SUFFIX] = scaled.contiguous()
    return state


def base_change_factors(state: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Return changes by module from named tensors: invert :func:`base_change_state`.

    Raises:
        SplitError: A name is no base change's, half a pair is missing, or shapes do not match.
    """
    changes: dict[str, Factors] = {}
    for name in sorted(state):
        if not name.endswith((A_SUFFIX, B_SUFFIX)):
            raise _unfit(f"{name} is no tensor of a base change")
        module = name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX)
        if module in changes:
            continue
        a, b = state.get(module + A_SUFFIX), state.get(module + B_SUFFIX)
        if a is None or b is None:
            raise _unfit(f"{module} has one of its two factors")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise _unfit(f"{module} has factors of shapes {list(a.shape)} and {list(b.shape)}")
        changes[module] = Factors(a, b)
    return changes


def with_base_change(
    adapter: Mapping[str, Tensor], scales: Mapping[str, float], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return an adapter that holds the base change as well, for use on the plain base.

    A module's rank becomes that of the sum, at most the two ranks together, and its scale 1.

    Args:
        adapter: By tensor name, as ``adapter_state`` returns it.
        scales: ΔW scale of its modules; as ``lora_scales`` returns them.
        state: As :func:`base_change_state` returns it.

    Returns:
        ``(adapter, scales)``; modules without a change are as they were.

    Raises:
        SplitError: The change does not fit the adapter.
    """
    layout = layout_of(adapter)
    whole, new_scales = dict(adapter), dict(scales)
    for module, change in base_change_factors(state).items():
        if module not in layout.modules:
            raise _unfit(f"{module} is no module with LoRA")
        own = factors_from(adapter, module, layout.modules[module], scales[module])
        if (own.out_features, own.in_features) != (change.out_features, change.in_features):
            raise _unfit(f"{module} changes by {[change.out_features, change.in_features]}")
        total = LowRankSum(own.out_features, own.in_features)
        total.add(own, 1.0)
        total.add(change, 1.0)
        spectrum = total.spectrum()
        if len(spectrum.S):
            factors_into(whole, module, layout, factors_of(spectrum, 1.0))
            new_scales[module] = 1.0
    return whole, new_scales


def set_base_change(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make ``state`` the model's base change, in place of the one it has; empty: none.

    On an error the model is as it was.

    Args:
        model: A model with LoRA attached.
        state: As :func:`base_change_state` returns it; columns for the training of cores, which
            travel with it, are left alone.

    Raises:
        SplitError: A module is not there, has no LoRA, or has another shape.
    """
    state = {name: value for name, value in state.items() if not name.endswith(CORE_COLUMNS)}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    terms: list[tuple[nn.Module, _Term]] = []
    for module, change in base_change_factors(state).items():
        if module not in layers:
            raise _unfit(f"{module} is no module with LoRA")
        base = layers[module].get_base_layer()
        shape = _weight_shape(layers[module], base)
        if shape != (change.out_features, change.in_features):
            found = [change.out_features, change.in_features]
            raise _unfit(f"{module} changes by {found}, and its weight is {list(shape)}")
        device = next(cast(nn.Module, layers[module]).parameters()).device
        kind = _EmbeddingTerm if isinstance(base, nn.Embedding) else _Term
        terms.append((base, kind(change.to(device))))
    for layer in model.modules():
        # By type and not by handle, so that a copy of a model loses its change as well.
        for key in [k for k, hook in layer._forward_hooks.items() if isinstance(hook, _Term)]:
            del layer._forward_hooks[key]
    for base, term in terms:
        base.register_forward_hook(term)


class _Term:
    """Adds ``x @ Aᵀ @ Bᵀ`` to a base layer's output, for x [..., in]."""

    def __init__(self, change: Factors) -> None:
        self.a, self.b = change.A, change.B

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the change to the layer's output; gradients flow on into its input."""
        return (output + self._of(layer, args[0])).to(output.dtype)

    def _of(self, layer: nn.Module, x: Tensor) -> Tensor:
        a, b = self.a.to(x.device), self.b.to(x.device)
        return functional.linear(functional.linear(x.to(torch.float32), a), b)


class _EmbeddingTerm(_Term):
    """Adds rows of ``B @ A`` to an embedding's output, for token ids x [...]."""

    def _of(self, layer: nn.Module, x: Tensor) -> Tensor:
        rows = functional.embedding(x, self.b.to(x.device)) @ self.a.to(x.device)
        # Some families scale inside their embedding; what the layer gave is scaled already.
        scale = getattr(layer, "embed_scale", None)
        if isinstance(scale, Tensor):
            scale = scale.to(rows.device, rows.dtype) if scale.numel() == 1 else None
        return rows if scale is None else rows * scale


def _weight_shape(layer: LoraLayer, base: nn.Module) -> tuple[int, int]:
    """Return ``[out, in]`` of a layer's ΔW as the aggregators write it."""
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    if not isinstance(base, (nn.Linear, Conv1D)) and not hasattr(base, "in_features"):
        raise SplitError(
            f"a method that changes the base works with linear layers and embeddings; "
            f"{type(base).__name__} is neither. Use a strategy.aggregator that leaves the base as it "
            'is, such as "product-delta", or other target-modules.'
        )
    return cast(int, layer.out_features), cast(int, layer.in_features)


def _unfit(problem: str) -> SplitError:
    return SplitError(
        f"the base change does not fit this model ({problem}). Use that of a run with the same "
        "model, cut layers and LoRA settings."
    )
