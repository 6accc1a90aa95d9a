"""What an adapter begins with.

LoRA factors are drawn from the run's seed and the weight's name, so everybody knows them. Magnitudes
of DoRA and weights that train whole come out of the base weights (*base values*), which the ServerApp
does not hold: it takes them from the clients, whose base weights are compared by digest.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from flower_split.aggregation.core.adapter_layout import MAGNITUDE
from flower_split.config import LoraPartConfig
from flower_split.lora.model_parts import part_of
from flower_split.lora.state import (
    ADAPTER_NAME,
    adapter_state,
    lora_layers,
)
from flower_split.lora.whole_weights import base_weights
from flower_split.split import CutLayers
from flower_split.split.structure.stack import LayerStack


def is_base_value(name: str) -> bool:
    """Return whether a tensor of an adapter begins as the base weights say."""
    return ".lora_" not in name or name.endswith(MAGNITUDE)


def is_copy(name: str) -> bool:
    """Return whether a base value is a base weight itself, so equal bit for bit on every machine."""
    return ".lora_" not in name


def has_base_values(parts: Mapping[str, LoraPartConfig]) -> bool:
    """Return whether an adapter of these settings has base values."""
    return any(
        part.train == "full"
        or part.bias != "none"
        or bool(part.modules_to_save)
        or (part.use_dora and part.has_lora)
        for part in parts.values()
    )


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """Return the base values of a model whose adapter is as it was attached, sorted by name."""
    return {name: value for name, value in adapter_state(model).items() if is_base_value(name)}


def base_digests(model: nn.Module) -> dict[str, str]:
    """Name of every base value -> digest of the base weight that it comes from.

    Of the weight and not of the value: a norm may differ in its last bit between machines.
    """
    sources: dict[str, Tensor] = dict(base_weights(model))
    for name, layer in lora_layers(model):
        if ADAPTER_NAME in layer.lora_magnitude_vector:
            sources[name + MAGNITUDE] = cast(Tensor, layer.get_base_layer().weight)
    return {name: digest_of(weight) for name, weight in sorted(sources.items())}


def digest_of(tensor: Tensor) -> str:
    """Return a digest of a tensor's bytes."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()[:16]


class Inits:
    """How every LoRA weight begins, by the weight's name."""

    def __init__(
        self,
        model: nn.Module,
        stack: LayerStack,
        cuts: CutLayers,
        parts: Mapping[str, LoraPartConfig],
    ) -> None:
        self._stack, self._cuts, self._parts = stack, cuts, parts
        self._embeddings = frozenset(
            name
            for name, layer in lora_layers(model)
            if isinstance(layer.get_base_layer(), nn.Embedding)
        )

    def __call__(self, name: str) -> str:
        """Return the ``init`` of the part that owns the weight."""
        module = name.split(".lora_", 1)[0]
        part = self._parts.get(part_of(module, self._stack, self._cuts, self._embeddings))
        return part.init if part is not None else "kaiming"


def initial_value(seed: int, name: str, shape: torch.Size, init: str) -> Tensor:
    """Return the initial value of the LoRA weight ``name``, fp32 on CPU; PEFT's distributions."""
    is_b = name.endswith("lora_B.weight")
    generator = _generator(seed, name)
    if name.endswith((".lora_embedding_A", ".lora_embedding_B")):
        # PEFT's zero factor of an embedding is A; only with random values is none zero.
        if name.endswith("A") and init != "random":
            return torch.zeros(shape)
        return torch.randn(shape, generator=generator)
    if init == "orthogonal":
        return _orthogonal(seed, name, shape, generator)
    if is_b and init != "random":
        return torch.zeros(shape)
    value = torch.empty(shape)
    if init == "gaussian":
        nn.init.normal_(value, std=1 / shape[0], generator=generator)
        return value
    nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def _orthogonal(seed: int, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Take A from the odd rows of an orthogonal ``[r, r]`` matrix, B from the even: B @ A is zero."""
    module = name.split(".lora_", 1)[0]
    is_a = name.endswith("lora_A.weight")
    rank, features = shape if is_a else (shape[1], shape[0])
    mixed = torch.randn(rank, rank, generator=_generator(seed, module)).double()
    rows: Tensor = torch.linalg.qr(mixed).Q[0 if is_a else 1 :: 2].float()
    value = torch.randn(features, rank // 2, generator=generator) @ rows / 10
    return value.T.contiguous() if is_a else value


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def weight_norms(model: nn.Module) -> dict[str, Tensor]:
    """Return the row norms of W + ΔW of every module with DoRA, fp32 on the CPU, by sorted name.

    Of an embedding: of every column.
    """
    norms: dict[str, Tensor] = {}
    for name, layer in sorted(lora_layers(model)):
        if ADAPTER_NAME in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[ADAPTER_NAME]
            before = cast(nn.Parameter, magnitude.weight)
            _renew(layer)
            norms[name] = cast(Tensor, magnitude.weight).detach().float().cpu()
            magnitude.weight = before
    return norms


def renew_magnitudes(model: nn.Module) -> None:
    """Set every magnitude of DoRA to the norms of W + ΔW, so that the layer computes with W + ΔW."""
    for _, layer in lora_layers(model):
        _renew(layer)


def _renew(layer: LoraLayer) -> None:
    if ADAPTER_NAME in layer.lora_magnitude_vector:
        magnitude = cast(DoraLinearLayer, layer.lora_magnitude_vector[ADAPTER_NAME])
        if ADAPTER_NAME in layer.lora_A:
            a, b = (cast(nn.Linear, f[ADAPTER_NAME]).weight for f in (layer.lora_A, layer.lora_B))
        else:
            a, b = layer.lora_embedding_A[ADAPTER_NAME], layer.lora_embedding_B[ADAPTER_NAME]
        with torch.no_grad():
            magnitude.update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=a,
                lora_B=b,
                scaling=layer.scaling[ADAPTER_NAME],
            )
