"""Quantizes the linear layers of a model with random weights, as transformers does with weights that it loads.

With bitsandbytes' own layers, on the device that will train. Loads torch on import, bitsandbytes when it is called.
"""

from __future__ import annotations

from typing import Any

import torch

from estimator.errors import InputError, MissingError

_OUTLIER_THRESHOLD = 6.0
"""transformers' default ``llm_int8_threshold``."""


def linear_layers(model: Any) -> list[tuple[str, Any]]:
    """(name, module) of what transformers quantizes: linear layers but the output's. Raises InputError for none."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = get_keys_to_not_convert(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is torch.nn.Linear) and should_convert_module(name, skipped)
    ]
    if not found:
        raise InputError("base_quantization: the model has no linear layers to quantize; write --method lora")
    return found


def check_bitsandbytes(kind: str) -> None:
    """Raises MissingError, one line, where the package that quantizes is not installed."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError(
            f"base_quantization: {kind} needs bitsandbytes; pip install bitsandbytes, or write --method lora"
        )


def quantize_base(model: Any, kind: str, *, half: torch.dtype, drawn: bool) -> None:
    """Replaces the linear layers of ``model``, which has weights on the CPU, by quantized ones.

    kind: ``nf4``, ``nf4-dq`` or ``int8``. half: what products compute in. drawn: whether the weights mean anything; if not,
    each is drawn on the device before it is quantized there, one at a time. A model without memory (on the meta device) is
    only looked at. Raises InputError for a model without such layers.
    """
    layers = linear_layers(model)
    if layers[0][1].weight.is_meta:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deviation = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    for name, module in layers:
        weight = module.weight.data if type(module) is torch.nn.Linear else module.weight.data.t()  # else a Conv1D
        if not drawn:
            weight = torch.empty(weight.shape, dtype=half, device=device).normal_(0.0, deviation)
        layer = _int8(weight, half, device) if kind == "int8" else _nf4(weight, half, device, nested=kind == "nf4-dq")
        if module.bias is not None:
            layer.bias = torch.nn.Parameter(module.bias.data.to(half), requires_grad=False)
        layer.source_cls = type(module)
        model.set_submodule(name, layer)
    # What transformers sets as it loads, and peft and Trainer ask for.
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)


def _nf4(weight: torch.Tensor, half: torch.dtype, device: torch.device, *, nested: bool) -> Any:
    """A layer without a bias. weight: [rows, columns]."""
    import bitsandbytes as bnb

    rows, columns = weight.shape
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            columns, rows, bias=False, compute_dtype=half, compress_statistics=nested, quant_type="nf4"
        )
    packed = bnb.nn.Params4bit(
        weight.to(half), requires_grad=False, compress_statistics=nested, quant_type="nf4", module=layer
    )
    layer.weight = packed.to(device)
    return layer


def _int8(weight: torch.Tensor, half: torch.dtype, device: torch.device) -> Any:
    """As ``_nf4``. It quantizes what comes from the CPU."""
    import bitsandbytes as bnb

    rows, columns = weight.shape
    with torch.device("meta"):
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=_OUTLIER_THRESHOLD)
    layer.weight = bnb.nn.Int8Params(weight.to("cpu", half), requires_grad=False, has_fp16_weights=False).to(device)
    return layer
