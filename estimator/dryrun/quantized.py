"""Linear layers of a quantized base, as the libraries that run them allocate: stand-ins that need none of them.

They compute nothing. Each holds the storages that the library's layer holds, and takes and keeps in forward and backward what
the library's does. Sources, read: bitsandbytes 0.50 (``nn/modules.py``, ``autograd/_functions.py``, ``backends/cuda/ops.py``),
GPTQModel 7 and AutoGPTQ (``qlinear_tritonv2``, ``triton_utils/dequant``), transformers 5 (``quantizers``), peft 0.21
(``tuners/lora/bnb.py``, ``tuners/lora/gptq.py``). Loads torch on import.

Left out: bitsandbytes 0.50 multiplies without dequantizing for up to 1,536 tokens (its backward always dequantizes, and so
did forward before), and the columns of outliers that LLM.int8() multiplies in half precision (few, and known only to the weights).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from estimator.errors import InputError

_BLOCK, _NESTED_BLOCK, _GROUP = 64, 256, 128
_TABLE = 256
_BITS = {"gptq-int4": 4, "gptq-int8": 8}


def quantize(model: Any, kind: str, *, half: torch.dtype) -> None:
    """Replaces the linear layers of ``model`` (transformers', on the meta device) that transformers would.

    kind: of ``estimator.setup.QUANTIZATIONS``. half: what products compute in. Raises InputError where transformers
    quantizes no layer, and for experts, which it leaves as they are.
    """
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
    table = torch.empty(_TABLE, dtype=torch.float32)
    for name, module in found:
        rows, columns = module.weight.shape
        if isinstance(module, Conv1D):
            rows, columns = columns, rows
        biased = module.bias is not None
        layer: _QuantizedLinear
        if kind in _BITS:
            layer = GptqLinear(columns, rows, biased, bits=_BITS[kind])
        elif kind == "int8":
            layer = Int8Linear(columns, rows, biased, half=half)
        else:
            layer = Nf4Linear(columns, rows, biased, half=half, table=table if kind == "nf4-dq" else None)
        model.set_submodule(name, layer)


def register_adapters(config: Any) -> None:
    """Tells a peft ``LoraConfig`` which adapter goes on top of which stand-in."""
    from peft.tuners.lora.layer import Linear

    class QuantizedLora(Linear):
        """peft's adapter of a bitsandbytes or GPTQ layer (``lora.Linear4bit``, ``Linear8bitLt``, ``GPTQLoraLinear``)."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            base: Any = self.base_layer
            result: torch.Tensor = base(x)
            if base.clones_output:
                result = result.clone()
            autocast = torch.is_autocast_enabled("cpu")
            for name in self.active_adapters:
                dtype = result.dtype
                narrow: Any = self.lora_A[name]
                if not (base.leaves_casts_to_autocast and autocast):
                    x = self._cast_input_dtype(x, narrow.weight.dtype)
                adapted = self.lora_B[name](narrow(self.lora_dropout[name](x))) * self.scaling[name]
                if base.leaves_casts_to_autocast:
                    result = result + (adapted if autocast else adapted.to(dtype))
                else:
                    result = (result + adapted).to(dtype)
            return result

    config._register_custom_module({_QuantizedLinear: QuantizedLora})


class _QuantizedLinear(torch.nn.Linear):
    """A frozen linear layer without a half-precision weight; its parts are buffers. Input: [..., columns]."""

    clones_output = False
    """peft's adapter copies what the layer returns."""
    leaves_casts_to_autocast = True
    """peft's adapter widens its input only where no autocast would narrow it again."""

    def __init__(self, columns: int, rows: int, biased: bool, *, half: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = columns, rows
        bias = torch.nn.Parameter(torch.empty(rows, dtype=half), requires_grad=False) if biased else None
        self.register_parameter("bias", bias)
        self._half = half

    def _hold(self, **parts: torch.Tensor) -> None:
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)


def _codes(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Nf4Linear(_QuantizedLinear):
    """``bitsandbytes.nn.Linear4bit``. table: the code of the second quantization, which all layers share; ``None``: there is none."""

    clones_output = True
    absmax: torch.Tensor
    offset: torch.Tensor

    def __init__(self, columns: int, rows: int, biased: bool, *, half: torch.dtype, table: torch.Tensor | None) -> None:
        super().__init__(columns, rows, biased, half=half)
        self.weight = _codes((columns * rows + 1) // 2, 1, dtype=torch.uint8)
        blocks = math.ceil(columns * rows / _BLOCK)
        self.nested = table is not None
        self._hold(code=torch.empty(16))
        if table is None:
            self._hold(absmax=torch.empty(blocks))
        else:
            self._hold(
                offset=torch.empty(()),
                absmax=torch.empty(blocks, dtype=torch.uint8),
                nested_absmax=torch.empty(math.ceil(blocks / _NESTED_BLOCK)),
                nested_code=table,
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Matmul4bit.apply(x.to(self._half), self).to(x.dtype)  # type: ignore[no-any-return, no-untyped-call]

    def dequantized(self, *, apart: bool) -> torch.Tensor:
        """The half-precision weight, [rows, columns]. apart: the widened statistics and their sum with the offset are two tensors."""
        if self.nested:
            absmax = torch.empty_like(self.absmax, dtype=torch.float32)
            absmax = absmax + self.offset if apart else absmax.add_(self.offset)
        return torch.empty(self.out_features, self.in_features, dtype=self._half)


class _Matmul4bit(torch.autograd.Function):
    """``MatMul4Bit``: keeps nothing; dequantizes for each product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Nf4Linear) -> torch.Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dequantized(apart=True), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return torch.matmul(gradient, ctx.layer.dequantized(apart=False).to(gradient.dtype)), None


class Int8Linear(_QuantizedLinear):
    """``bitsandbytes.nn.Linear8bitLt`` with transformers' threshold for outliers."""

    def __init__(self, columns: int, rows: int, biased: bool, *, half: torch.dtype) -> None:
        super().__init__(columns, rows, biased, half=half)
        self.weight = _codes(rows, columns, dtype=torch.int8)
        self._hold(row_absmax=torch.empty(rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Matmul8bit.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]


class _Matmul8bit(torch.autograd.Function):
    """``MatMul8bitLt``: the input is quantized by rows, the product is int32, then fp16, then the input's type. The input
    is kept on the context, where it lives as long as the graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        codes, _absmax = _quantized_rows(rows.to(torch.float16))
        products = torch.empty(len(codes), layer.out_features, dtype=torch.int32)
        halves = torch.empty_like(products, dtype=torch.float16)
        ctx.layer, ctx.rows, ctx.shape = layer, rows, x.shape
        return halves.to(x.dtype).reshape(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        layer, dtype = ctx.layer, ctx.rows.dtype
        gradient = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        weight = layer.weight.to(dtype, copy=True).mul_(layer.row_absmax.unsqueeze(1).mul(1 / 127))
        return torch.matmul(gradient.to(dtype), weight).view(ctx.shape), None


def _quantized_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``int8_vectorwise_quant``: codes and a statistic for each row, having looked for outliers."""
    absmax = torch.empty(len(x), dtype=torch.float32)
    codes = torch.empty_like(x, dtype=torch.int8)
    outliers = x.abs() >= 6.0
    del outliers
    return codes, absmax


class GptqLinear(_QuantizedLinear):
    """``QuantLinear`` with Triton kernels, the one that has a backward pass. It computes in fp16 only."""

    leaves_casts_to_autocast = False

    def __init__(self, columns: int, rows: int, biased: bool, *, bits: int) -> None:
        super().__init__(columns, rows, biased, half=torch.float16)
        self.register_parameter("weight", None)
        groups = math.ceil(columns / _GROUP)
        self._hold(
            qweight=torch.empty(math.ceil(columns / 32) * bits, rows, dtype=torch.int32),
            qzeros=torch.empty(groups, math.ceil(rows / 32) * bits, dtype=torch.int32),
            scales=torch.empty(groups, rows, dtype=torch.float16),
            g_idx=torch.empty(columns, dtype=torch.int32),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _MatmulGptq.apply(x.reshape(-1, x.shape[-1]), self).half()  # type: ignore[no-untyped-call]
        found = found.reshape(*x.shape[:-1], self.out_features)
        return found if self.bias is None else found + self.bias

    def dequantized(self) -> torch.Tensor:
        """The fp16 weight, [columns, rows]."""
        return torch.empty(self.in_features, self.out_features, dtype=torch.float16)


class _MatmulGptq(torch.autograd.Function):
    """``QuantLinearFunction``: keeps only the layer's own tensors; dequantizes for each product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: GptqLinear) -> torch.Tensor:
        ctx.layer = layer
        return torch.matmul(x, layer.dequantized())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return torch.matmul(gradient, ctx.layer.dequantized().t()), None
