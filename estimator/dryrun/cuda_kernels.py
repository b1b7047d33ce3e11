"""What a CUDA device would do differently from the CPU whose fake tensors stand for its own.

Which attention kernel runs and what it keeps; which functions autocast widens; buffers that kernels take for themselves.
Sources: ``aten/src/ATen/native/transformers`` (sdp_utils.cpp, attention.cu and its backward), ``autocast_mode.h``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from estimator.errors import InputError

_aten = torch.ops.aten
_BACKWARD_FLASH = _aten._scaled_dot_product_flash_attention_backward.default
_BACKWARD_EFFICIENT = _aten._scaled_dot_product_efficient_attention_backward.default
MATRIX_PRODUCTS = frozenset(
    {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.mv.default}
)  # fmt: skip
"""Operators that call cuBLAS, whose workspace the first of each thread allocates."""

# The functions of autocast's fp32 list that CUDA has and the CPU has not, as models call them.
_WIDENED: frozenset[Any] = frozenset(
    {
        torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, torch.Tensor.rsqrt, torch.exp, torch.Tensor.exp,
        torch.log, torch.Tensor.log, torch.sum, torch.Tensor.sum, torch.cumsum, torch.Tensor.cumsum, torch.prod, torch.Tensor.prod,
        torch.norm, torch.Tensor.norm, torch.softmax, torch.Tensor.softmax, functional.softmax, functional.log_softmax,
        functional.layer_norm, functional.cross_entropy, functional.nll_loss, functional.softplus, functional.gelu,
        torch.reciprocal, torch.Tensor.reciprocal,
    }
    - {functional.gelu}
)  # fmt: skip
_HALF = (torch.float16, torch.bfloat16)
_ATTENTION = functional.scaled_dot_product_attention  # which context parallelism wraps


class CudaFunctions(TorchFunctionMode):
    """Calls of Python functions as a CUDA device would run them.

    kernel: ``flash``, ``efficient``, ``cudnn`` or ``math`` where it is known; ``None``: as PyTorch would choose. compiled: the
    layers are traced for inductor; raises InputError for attention of which it would generate the code.
    """

    def __init__(self, kernel: str | None, *, compiled: bool = False) -> None:
        super().__init__()
        self._kernel, self._compiled = kernel, compiled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION:
            return _attention(self._kernel, self._compiled, *args, **kwargs)
        if func in _WIDENED and torch.is_autocast_enabled("cpu"):
            args = tuple(_widened(value) for value in args)
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALF else value


def _attention(
    kernel: str | None,
    compiled: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``scaled_dot_product_attention`` with the kernel that CUDA picks. query, key, value: [batch, heads, tokens, width]."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(dtype) if t.is_floating_point() else t for t in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    chosen = _choose(kernel, query, key, value, attn_mask, enable_gqa)
    if chosen == "math" and compiled:
        raise InputError(
            "compile: SDPA has no kernel for grouped queries in fp32 or with this mask; write --attention eager or --precision bf16-mixed, or leave out --compile"
        )
    with torch.autocast("cpu", enabled=False):
        if chosen == "math":
            return _math(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if chosen == "flash":
            width = query.shape[-1]
            padded = [_padded(t, 8) for t in (query, key, value)]
            scale = scale if scale is not None else 1 / math.sqrt(width)
            found = _aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)
            return found[0] if width == padded[0].shape[-1] else found[0][..., :width]
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        keeps = any(t.requires_grad for t in (query, key, value)) and torch.is_grad_enabled()
        if chosen == "cudnn":
            return _aten._scaled_dot_product_cudnn_attention(
                query, key, value, bias, keeps, dropout_p, is_causal, False, scale=scale
            )[0]
        return _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
        )[0]


def _choose(
    kernel: str | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, enable_gqa: bool
) -> str:
    """PyTorch's order is flash, memory-efficient, math; flash takes half precision without a mask, up to a width of 256."""
    if kernel is None and key.shape[1] != query.shape[1] and not enable_gqa:
        return "math"  # broadcasts; no fused kernel does (ATen's check_batch_size_and_num_heads_dense)
    if kernel in ("cudnn", "math"):
        return kernel
    flash = query.dtype in _HALF and mask is None and query.shape[-1] == value.shape[-1] <= 256
    if flash and kernel != "efficient":
        return "flash"
    # The memory-efficient kernel has no grouped queries.
    return "math" if enable_gqa and key.shape[1] != query.shape[1] else "efficient"


def _padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    short = -tensor.shape[-1] % multiple
    return functional.pad(tensor, (0, short)) if short else tensor


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The additive mask that the memory-efficient kernel keeps: of the compute type, its rows aligned to 8 elements."""
    if mask.dtype == torch.bool:
        mask = torch.where(
            mask.logical_not(), torch.full((), -math.inf, dtype=query.dtype), torch.zeros((), dtype=query.dtype)
        )
    length = mask.shape[-1]
    if length % 8:
        mask = _padded(mask, 8)[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _math(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, dropout_p: float, is_causal: bool, scale: Any, gqa: bool
) -> torch.Tensor:  # fmt: skip
    """``_scaled_dot_product_attention_math``: fp32 scores are what half-precision inputs get."""
    dtype = query.dtype
    if gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scale = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    if dtype in _HALF:
        query, key, value = query.float(), key.float(), value.float()
    scores = (query * math.sqrt(scale)) @ (key * math.sqrt(scale)).transpose(-2, -1)
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        mask = torch.where(allowed, 0.0, -math.inf).to(query.dtype)
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -math.inf).to(query.dtype) if mask.dtype == torch.bool else mask)
    return (functional.dropout(scores.softmax(-1), dropout_p) @ value).to(dtype)


def kernel_buffers(operator: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Bytes of the buffers that a kernel takes for the time that it runs, beyond what it returns."""
    rule = _BUFFERS.get(operator)
    return () if rule is None else rule(args)


def _flash_backward(args: tuple[Any, ...]) -> tuple[int, ...]:
    _, query, key, value = args[:4]
    batch, heads, tokens, width = query.shape
    rows = math.ceil(tokens / 128) * 128
    buffers = [4 * batch * heads * rows, 4 * batch * rows * heads * (math.ceil(width / 32) * 32)]
    if key.shape[1] != heads:  # gradients of every query head, summed afterwards
        buffers += [t.element_size() * batch * key.shape[2] * heads * width for t in (key, value)]
    return tuple(buffers)


def _efficient_backward(args: tuple[Any, ...]) -> tuple[int, ...]:
    _, query, *_ = args
    batch, heads, tokens, width = query.shape
    delta = 4 * batch * heads * tokens
    # Gradients of fp16 and bf16 are accumulated in fp32 where a block of keys does not hold a whole width.
    accumulators = 4 * batch * heads * tokens * width if query.dtype in _HALF and width > 128 else 0
    return tuple(size for size in (delta, accumulators) if size)


def _embedding_backward(args: tuple[Any, ...]) -> tuple[int, ...]:
    indices = args[1]
    count = indices.numel()
    # Sorted by row: the indices, their positions, and the scratch of the sort; few indices take another kernel.
    return (8 * count,) * 4 if count > 3072 else ()


_BUFFERS: dict[Any, Callable[[tuple[Any, ...]], tuple[int, ...]]] = {
    _BACKWARD_FLASH: _flash_backward,
    _BACKWARD_EFFICIENT: _efficient_backward,
    _aten.embedding_dense_backward.default: _embedding_backward,
    _aten._linalg_svd.default: lambda args: (args[0].nbytes,),  # cuSOLVER works on a copy; its workspace is left out
}
