"""In which numbers the frozen weights of a run are kept: quantized while they are loaded, or cast layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from crepa_kernels.config.rules import describe

BasePrecision = Literal["bf16", "fp8", "int8", "fp8_dynamic", "nf4"]

# Made by a quantizing library, which computes in bf16.
QUANTIZED = {"int8": "torchao", "fp8_dynamic": "torchao", "nf4": "bitsandbytes"}


def check_base_precision(base_precision: BasePrecision, device_type: str) -> None:
    """ValueError for one that this machine or what is installed on it cannot train with."""
    given = f"base_precision = {base_precision}"
    package = QUANTIZED.get(base_precision)
    if package is not None and find_spec(package) is None:
        raise ValueError(f"{given} needs {package}: pip install crepa-kernels[quantization]")
    if base_precision == "nf4" and device_type == "cpu":
        raise ValueError(f"{given} needs a GPU: diffusers loads bitsandbytes' weights on nothing else; use int8 or fp8")
    if base_precision == "fp8_dynamic" and not _multiplies_fp8(device_type):
        rule = "a GPU that multiplies fp8 (compute capability 8.9 or MI300)"
        raise ValueError(f"{given} needs {rule}; use fp8 or int8")


def base_problems(values: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    """Settings that contradict where the frozen weights lie and in which numbers, with the keys that they are about."""
    base = describe("base_precision", values["base_precision"], "")
    if values["base_precision"] in QUANTIZED and values["mixed_precision"] != "bf16":
        yield {"base_precision", "mixed_precision"}, f'{base}it computes in bf16: mixed_precision must be "bf16"'
    if values["base_precision"] != "bf16" and values["compile_blocks"]:
        yield {"base_precision", "compile_blocks"}, f"{base}compile_blocks must be false"
    if values["base_precision"] != "bf16" and values["training"] == "full":
        yield {"base_precision", "training"}, f'{base}training = "full" keeps all weights in fp32'
    offload = describe("offload", values["offload"], "")
    if values["lora_type"] not in ("lora", "rslora"):
        # peft takes the weight itself for some of them, which is then of another type or elsewhere.
        rule = f'lora_type = "{values["lora_type"]}" has only been tried on weights that are there as they are'
        if values["base_precision"] != "bf16":
            yield {"base_precision", "lora_type"}, f"{base}{rule}"
        if values["offload"] != "none":
            yield {"offload", "lora_type"}, f"{offload}{rule}"
    if values["offload"] == "none":
        return
    if values["training"] == "full":
        yield {"offload", "training"}, f'{offload}training = "full" has no frozen weights'
    if not values["gradient_checkpointing"]:
        rule = "the backward pass would find the weights gone: gradient_checkpointing must be true"
        yield {"offload", "gradient_checkpointing"}, f"{offload}{rule}"
    if values["compile_blocks"]:
        yield {"offload", "compile_blocks"}, f"{offload}compile_blocks must be false"
    if values["base_precision"] == "nf4":
        rule = "the weights of bitsandbytes stay on the GPU: base_precision must be another"
        yield {"offload", "base_precision"}, f"{offload}{rule}"


def _multiplies_fp8(device_type: str) -> bool:
    if device_type != "cuda":
        return False
    from torchao.utils import is_MI300, is_sm_at_least_89

    return bool(is_sm_at_least_89() or is_MI300())


def loading(base_precision: BasePrecision) -> dict[str, Any]:
    """Arguments of a diffusers model's `from_pretrained` that quantize each weight as it is read."""
    if base_precision not in QUANTIZED:
        return {}
    import diffusers

    if base_precision == "nf4":
        four_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        return {"quantization_config": diffusers.BitsAndBytesConfig(load_in_4bit=True, **four_bits)}
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, PerRow

    config = (
        Int8WeightOnlyConfig(version=2)
        if base_precision == "int8"
        else Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    )
    return {"quantization_config": diffusers.TorchAoConfig(config)}


def prepare_base(transformer: Any, base_precision: BasePrecision, compute_dtype: torch.dtype) -> None:
    """What is left to do when the weights are loaded and have their adapters."""
    if base_precision == "fp8":
        # Convolutions keep their type: their backward pass reads the weight itself, which would be fp8 by then, and
        # not the copy that they computed with.
        kept = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype, skip_modules_classes=kept)
    elif base_precision in QUANTIZED:
        compute_in_bf16(transformer)


def compute_in_bf16(model: nn.Module) -> None:
    """Has quantized layers compute in bf16 as all others do under autocast, which does not reach them, and gives those
    that quantize what comes in, too, a gradient: PyTorch knows none of their product.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and type(layer.weight).__module__.partition(".")[0] in QUANTIZED.values():
            layer.register_forward_pre_hook(_to_bf16)
            if getattr(layer.weight, "act_quant_kwargs", None) is not None:
                layer.forward = MethodType(_with_gradient, layer)  # type: ignore[method-assign]


def _to_bf16(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].to(torch.bfloat16), *inputs[1:]


def _with_gradient(layer: nn.Linear, inputs: Tensor) -> Tensor:
    product: Tensor = _Product.apply(inputs, layer.weight, layer.bias)
    return product


class _Product(torch.autograd.Function):
    """A linear layer's product, and the gradient of its inputs by the weights as they are stored."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.weight.dequantize().to(gradient.device)
        return gradient.to(weight.dtype) @ weight, None, None
