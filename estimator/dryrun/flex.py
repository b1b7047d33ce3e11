"""FlexAttention as inductor compiles it for a GPU, by what it allocates. Loads torch on import.

Sources: ``torch/_inductor/kernel/flex/flex_attention.py``, ``torch/nn/attention/flex_attention.py``, and
``transformers/integrations/flex_attention.py``, whose compiled calls are what is replaced here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from estimator.dryrun.private_api import replaced

_BLOCK = 128


@contextlib.contextmanager
def compiled_flex_attention() -> Iterator[None]:
    """Calls of flex attention and of its block mask, as transformers makes them, run the stand-ins."""
    from transformers import masking_utils
    from transformers.integrations import flex_attention

    with (
        replaced(flex_attention, "compile_friendly_flex_attention", _attention),
        replaced(masking_utils, "create_block_mask", _block_mask),
    ):
        yield


def _block_mask(mask_mod: Any, B: int, H: int | None, Q_LEN: int, KV_LEN: int, **_: Any) -> BlockMask:
    """Tables of partial and full blocks, by query and by key: int32 [B, 1, rows] and [B, 1, rows, columns]."""
    rows, columns = math.ceil(Q_LEN / _BLOCK), math.ceil(KV_LEN / _BLOCK)
    counts = [torch.empty(B, 1, rows, dtype=torch.int32) for _ in range(2)]
    places = [torch.empty(B, 1, rows, columns, dtype=torch.int32) for _ in range(2)]
    return BlockMask.from_kv_blocks(
        counts[0], places[0], counts[1], places[1], BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(Q_LEN, KV_LEN)
    )


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    """query, key, value: [batch, heads, tokens, width]; returns the output. transformers also casts the log-sum-exp."""
    output, log_sum = _Flex.apply(query, key, value)  # type: ignore[no-untyped-call]
    (log_sum * math.log(2)).to(value.dtype)
    return output  # type: ignore[no-any-return]


class _Flex(torch.autograd.Function):
    """Keys and values are read by groups of query heads without being repeated."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = torch.empty_like(query[..., : value.shape[-1]])  # latent attention's values are narrower
        log_sum = torch.empty(query.shape[:-1], dtype=torch.float32)
        ctx.mark_non_differentiable(log_sum)
        ctx.save_for_backward(query, key, value, output, log_sum)
        return output, log_sum

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, ...]:
        query, key, value, _, log_sum = ctx.saved_tensors
        delta = torch.empty_like(log_sum)
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del delta
        return found
