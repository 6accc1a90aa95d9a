"""A quantisation method of our own, registered with transformers: 8 bits a weight, in plain torch.

It shows that loading passes any method through, on a machine without a quantisation library.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "toy-int8"
QUANTISED: list[str] = []  # names of the weights that were quantised, in their order


class ToyLinear(nn.Linear):
    """A linear layer whose weight is rounded to 8 bits with one scale a row."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        whole = torch.empty(outputs, inputs, dtype=torch.int8, device="meta")
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.weight_scale = nn.Parameter(
            torch.empty(outputs, 1, device="meta"), requires_grad=False
        )

    def forward(self, value: Tensor) -> Tensor:
        weight = self.weight.to(value.dtype) * self.weight_scale.to(value.dtype)
        return nn.functional.linear(value, weight, self.bias)


class DeafLinear(ToyLinear):
    """One without a backward."""

    def forward(self, value: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(value)


class ForeignLinear(nn.Module):
    """One that is no linear layer of torch."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.inner = ToyLinear(inputs, outputs, bias)
        self.weight, self.weight_scale = self.inner.weight, self.inner.weight_scale
        del self.inner

    def forward(self, value: Tensor) -> Tensor:
        return nn.functional.linear(value, self.weight.to(value.dtype) * self.weight_scale)


KINDS = {"plain": ToyLinear, "deaf": DeafLinear, "foreign": ForeignLinear}


@register_quantization_config(METHOD)
class ToyConfig(QuantizationConfigMixin):
    """Args: kind: of layer; trainable: what the method says of itself."""

    def __init__(
        self,
        kind: str = "plain",
        trainable: bool = True,
        modules_to_not_convert: list[str] | None = None,
        **others: object,
    ) -> None:
        self.quant_method = METHOD
        self.kind, self.trainable = kind, trainable
        self.modules_to_not_convert = modules_to_not_convert


class ToyQuantize(ConversionOps):
    """A whole weight as rounded numbers and scales."""

    def __init__(self, quantizer: HfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, list[Tensor]], full_layer_name: str = "", **others: object
    ) -> dict[str, Tensor]:
        ((_, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        QUANTISED.append(full_layer_name)
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
        rounded = (weight.float() / scale).round().to(torch.int8)
        return {full_layer_name: rounded, f"{full_layer_name}_scale": scale}


@register_quantizer(METHOD)
class ToyQuantizer(HfQuantizer):
    """Puts the layers in and says what is quantised."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **others: object
    ) -> None:
        keep = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules
        )
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and should_convert_module(name, keep):
                kind = KINDS[self.quantization_config.kind]
                with torch.device("meta"):
                    new = kind(module.in_features, module.out_features, module.bias is not None)
                model.set_submodule(name, new)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **others: object
    ) -> bool:
        module, name = get_module_from_name(model, param_name)
        return (
            isinstance(module, tuple(KINDS.values()))
            and name == "weight"
            and not self.pre_quantized
        )

    def get_quantize_ops(self) -> ToyQuantize:
        return ToyQuantize(self)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self.quantization_config.trainable
