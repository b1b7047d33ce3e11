"""Grouped products of experts, which torch's shape rules know in bf16 only. Loads torch on import."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from estimator.dryrun.private_api import replaced


@contextlib.contextmanager
def grouped_products() -> Iterator[None]:
    """``torch.nn.functional.grouped_mm`` in every type, as transformers calls it on devices that have it. Its own stand-in
    for others would keep inputs of frozen experts, and make gradients for them."""
    from transformers.integrations import moe

    with replaced(moe, "_grouped_mm", _grouped):
        yield


def _grouped(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """input: [tokens, in]; weight: [experts, in, out]; returns [tokens, out]. Autocast does not reach it."""
    if weight.dtype == torch.bfloat16:
        return torch.nn.functional.grouped_mm(input.to(weight.dtype), weight, offs=offs)
    return _Grouped.apply(input.to(weight.dtype), weight, offs)  # type: ignore[no-any-return, no-untyped-call]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        trains, reaches = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
        ctx.save_for_backward(input if trains else None, weight if trains or reaches else None, offs)
        return torch.ops.transformers.grouped_mm_fallback(input, weight, offs)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        input, weight, offs = ctx.saved_tensors
        if input is None:
            return torch.ops.transformers.grouped_mm_fallback(gradient, weight.transpose(-2, -1), offs), None, None
        found = torch.ops.transformers.grouped_mm_fallback_backward(input, weight, offs, gradient)
        return found[0] if ctx.needs_input_grad[0] else None, found[1], None
