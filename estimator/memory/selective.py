"""Selective activation checkpointing as torchtitan's published runs have it (``selective_ac_option = "op"``). Loads torch on import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_PRODUCT = _aten.mm.default
SAVED = frozenset(
    {
        _PRODUCT,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_attention_math.default,
        _aten.max.default,
    }
)
"""torchtitan's list (``distributed/activation_checkpoint.py``, 0.3.0), without what one device never calls.

Nor what routers pick (``topk``): some of transformers' write into it, which a kept result forbids."""


def selective_contexts() -> tuple[Any, Any]:
    """The two contexts of one layer's forward pass and recomputation: what is costly is kept, but of the matrix products
    every second is recomputed."""
    forward, again = policy(), policy()

    def choose(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return (again if context.is_recompute else forward)(operator)

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(choose)
    return contexts


def policy() -> Callable[[Any], CheckpointPolicy]:
    """What becomes of each operator's result, asked for one layer's operators in their order."""
    products = 0

    def choose(operator: Any) -> CheckpointPolicy:
        nonlocal products
        if operator is _PRODUCT:
            products += 1
            if products % 2 == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if operator in SAVED else CheckpointPolicy.PREFER_RECOMPUTE

    return choose
