"""Quantised base weights, through transformers' own quantisation.

Each party quantises the layers it owns while it reads them, exactly as the unsplit model's layers
would be: whatever transformers keeps in full precision by a rule over the whole model (the head,
tied weights, the last module) is decided on the whole model here, not on a part of it. LoRA stays
fp32 on top, and gradients flow through the frozen quantised weights; that they do is tried on a
tiny input after loading, so that a method which cannot train is refused by name, without a list.

4 bits with LoRA on top: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs",
NeurIPS 2023. 8 bits: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
Scale", NeurIPS 2022.
"""

import copy
import functools
import json
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from flower_split.errors import SplitError

DEQUANTIZE = "dequantize"
# As in the quantization_config of a config.json.
PRESETS: dict[str, dict[str, object]] = {
    "bnb-8bit": {"load_in_8bit": True},
    "bnb-4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}
# What the quantisation methods call the modules that they leave as they are.
_SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")

Quantization = QuantizationConfigMixin | str


def resolve_quantization(
    name_or_path: str,
    config: PreTrainedConfig,
    skeleton: PreTrainedModel,
    quantization: Quantization | None,
    dtype: torch.dtype | None,
    device_map: object = None,
) -> QuantizationConfigMixin | None:
    """Return the quantisation that a checkpoint is loaded with, checked as far as it can be by now.

    Args:
        name_or_path: Names the checkpoint in errors.
        config: Its configuration; a quantisation that it names counts.
        skeleton: The whole model without weights.
        quantization: What was asked for: transformers' own object; ``"bnb-8bit"``; ``"bnb-4bit"``
            (NF4 with double quantisation); ``"dequantize"``, for a checkpoint that is quantised; or
            a JSON object as in ``quantization_config`` of a ``config.json``. None or "": as the
            checkpoint is.
        dtype: Dtype of the weights that are not quantised, and of the computation; None: the checkpoint's.
        device_map: Where the weights will go, as ``from_pretrained`` takes it.

    Returns:
        What ``from_pretrained`` takes; None: plain weights.

    Raises:
        SplitError: It does not exist, cannot be had here, or the checkpoint is quantised already.
    """
    own = quantization_of(config)
    try:
        if own is not None:
            chosen = _of_checkpoint(name_or_path, own, quantization)
        elif not quantization:
            return None
        elif quantization == DEQUANTIZE:
            raise SplitError(
                f"the checkpoint {name_or_path!r} is not quantised, so there is nothing to "
                'dequantise. Set model.quantization = "".'
            )
        else:
            chosen = _asked_for(quantization, dtype or getattr(config, "dtype", None))
        _leave_out(chosen, skeleton)
        quantizer = AutoHfQuantizer.from_config(chosen, pre_quantized=own is not None)
        quantizer.validate_environment(device_map=device_map, weights_only=True)
        trains = getattr(chosen, DEQUANTIZE, False) or quantizer.is_trainable
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        raise SplitError(
            f"{name_or_path!r} cannot be loaded with quantisation {method_of(own or quantization)}: "
            f"{' '.join(str(error).split())} Install what it needs, or choose another "
            "model.quantization or checkpoint."
        ) from error
    if not trains:
        raise SplitError(_untrainable(name_or_path, chosen, "transformers says so"))
    return chosen


def quantization_of(config: PreTrainedConfig) -> object:
    """Return what the configuration of a checkpoint says of its quantisation; None: it is not quantised."""
    of_text: object = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return getattr(config, "quantization_config", None) or of_text


def check_quantised(
    name_or_path: str,
    model: nn.Module,
    skeleton: PreTrainedModel,
    quantization: QuantizationConfigMixin,
    leaf: Tensor,
    run: Callable[[Tensor], Tensor],
) -> None:
    """Check that LoRA can sit on a quantised part, and that gradients flow through it.

    Args:
        name_or_path: Names the checkpoint in errors.
        model: The part, loaded.
        skeleton: The same part before quantisation.
        quantization: What it was loaded with.
        leaf: A tiny input that requires grad.
        run: From ``leaf`` through every layer of the part.

    Raises:
        SplitError: It cannot be trained.
    """
    loaded = dict(model.named_modules())
    linear: dict[str, nn.Module] = {}
    for name, module in skeleton.named_modules():
        replaced = loaded.get(name)
        if not isinstance(module, (nn.Linear, Conv1D)) or replaced is None:
            continue
        if not isinstance(replaced, (nn.Linear, Conv1D)):
            why = f"it makes {name} a {type(replaced).__name__}, which is no linear layer of torch"
            raise SplitError(_untrainable(name_or_path, quantization, why))
        linear[name] = replaced
    dequantised = getattr(quantization, DEQUANTIZE, False)
    if linear and not dequantised and not any(_is_quantised(m) for m in linear.values()):
        raise SplitError(
            f"quantisation {method_of(quantization)} changes no layer of {name_or_path!r}: it does "
            "not know this family's linear layers. Leave model.quantization empty."
        )
    deaf: list[str] = []
    handles = [
        module.register_forward_hook(functools.partial(_note_deaf, name, deaf))
        for name, module in linear.items()
    ]
    try:
        with torch.enable_grad():
            output = run(leaf)
            weight = torch.linspace(-1, 1, output.numel(), device=output.device)
            (gradient,) = torch.autograd.grad((output.float().flatten() * weight).sum(), leaf)
        fine = bool(gradient.isfinite().all() and gradient.ne(0).any())
        why = "the gradient of a tiny input is zero or not finite"
        if deaf:
            fine, why = False, f"no gradient passes {deaf[0]}"
    except (RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
        fine, why = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        for handle in handles:
            handle.remove()
    if not fine:
        raise SplitError(_untrainable(name_or_path, quantization, why))


def settle_dtype(model: PreTrainedModel, names: Collection[str], dtype: torch.dtype) -> None:
    """Give a part of a quantised checkpoint the dtype asked for, where it is not quantised.

    transformers leaves such weights as they were stored.

    Args:
        model: The part.
        names: The parameters that the part has without quantisation.
        dtype: Theirs.
    """
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, parameter in model.named_parameters():
        plain = parameter.is_floating_point() and parameter.itemsize > 1
        if name in names and plain and not any(word in name.split(".") for word in kept):
            parameter.data = parameter.data.to(dtype)


def keep_trainable(model: nn.Module) -> None:
    """Let no evaluation change quantised weights.

    On some processors bitsandbytes lays 4-bit weights out anew, rounded and without a backward, the
    first time that they are used without autograd.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def float_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype that a part computes in: of its base weights; of a quantised part, the declared one.

    LoRA in fp32 beside a bf16 base does not decide it, nor do the scales of quantised weights.
    """
    config = getattr(module, "config", None)
    declared = getattr(config, "dtype", None)
    if isinstance(declared, torch.dtype) and getattr(config, "quantization_config", None):
        return declared
    for name, parameter in module.named_parameters():
        trains = "lora_" in name or ".parametrizations." in name  # in fp32 whatever the base's is
        if parameter.is_floating_point() and parameter.itemsize > 1 and not trains:
            return parameter.dtype
    return declared if isinstance(declared, torch.dtype) else torch.float32


def method_of(quantization: object) -> str:
    """Return the name of a quantisation, for people."""
    if isinstance(quantization, str):
        return quantization
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "without a quant_method"))
    method = getattr(quantization, "quant_method", type(quantization).__name__)
    return str(getattr(method, "value", method))


def _of_checkpoint(
    name_or_path: str, own: object, quantization: Quantization | None
) -> QuantizationConfigMixin:
    """Return the quantisation of a checkpoint that is quantised already."""
    config: Any = AutoQuantizationConfig.from_dict(own) if isinstance(own, dict) else own
    if quantization == DEQUANTIZE:
        if not hasattr(config, DEQUANTIZE):
            raise SplitError(
                f"the checkpoint {name_or_path!r} is quantised with {method_of(own)}, which "
                "transformers does not dequantise while loading. Use the checkpoint that it was "
                "made of."
            )
        config.dequantize = True
    elif quantization:
        raise SplitError(
            f"the checkpoint {name_or_path!r} is quantised already, with {method_of(own)}; "
            f"model.quantization = {method_of(quantization)!r} would quantise it again. Leave "
            'model.quantization empty, or set it to "dequantize".'
        )
    assert isinstance(config, QuantizationConfigMixin)
    return config


def _asked_for(quantization: Quantization, dtype: object) -> QuantizationConfigMixin:
    """Return the quantisation that a name, a JSON object or an object of transformers means."""
    if isinstance(quantization, QuantizationConfigMixin):
        return copy.deepcopy(quantization)  # what stays as it is will be entered into it
    if quantization in PRESETS:
        fields = dict(PRESETS[quantization])
    elif quantization.lstrip().startswith("{"):
        fields = dict(json.loads(quantization))
    else:
        raise SplitError(
            f"the quantisation must be one of {', '.join((*PRESETS, DEQUANTIZE))}, or a JSON object "
            f"such as transformers' quantization_config; it is {quantization!r}."
        )
    if fields.get("load_in_4bit"):
        compute = dtype if isinstance(dtype, torch.dtype) else torch.float32
        fields.setdefault("bnb_4bit_compute_dtype", str(compute).removeprefix("torch."))
    config = AutoQuantizationConfig.from_dict(fields)
    assert isinstance(config, QuantizationConfigMixin)
    return config


def _leave_out(quantization: QuantizationConfigMixin, skeleton: PreTrainedModel) -> None:
    """Name the modules that stay as they are, as the whole model would have them."""
    for name in _SKIP_LISTS:
        if hasattr(quantization, name) and getattr(quantization, name) is None:
            setattr(quantization, name, get_keys_to_not_convert(skeleton))


def _is_quantised(linear: nn.Module) -> bool:
    """Return whether a linear layer's weight is another kind of thing than numbers of 16 bits or more."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    plain = type(weight.data) is Tensor and type(weight) in (Tensor, nn.Parameter)
    return not plain or not weight.is_floating_point() or weight.itemsize == 1


def _note_deaf(
    name: str, deaf: list[str], module: nn.Module, args: tuple[object, ...], output: object
) -> None:
    """Note a layer whose output forgets that its input wants a gradient."""
    wanted = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
    if wanted and isinstance(output, Tensor) and not output.requires_grad:
        deaf.append(name)


def _untrainable(name_or_path: str, quantization: object, why: str) -> str:
    remedy = "Use a checkpoint that is not quantised, or bnb-4bit or bnb-8bit on it."
    if hasattr(quantization, DEQUANTIZE):
        remedy = f'Set model.quantization = "{DEQUANTIZE}", or use another checkpoint.'
    return (
        f"{name_or_path!r} cannot be trained with quantisation {method_of(quantization)} ({why}). "
        + remedy
    )
