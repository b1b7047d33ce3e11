"""Context parallelism as torch has it: ring attention over sequences that several ranks share. Loads torch on import.

Every rank holds its share of each sequence, head and tail balanced, and runs the layers on it alone; in attention it goes
through everybody's keys and values, which it gathers once (torch's, torchtitan's and accelerate's default), and sends
their gradients round. Source: ``torch/distributed/tensor/experimental/_context_parallel``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.distributed.tensor.experimental._context_parallel import _attention as ring


@contextlib.contextmanager
def ring_attention(mesh: Any) -> Iterator[None]:
    """``scaled_dot_product_attention`` of [batch, heads, tokens of this rank, width] attends over all ranks of ``mesh``, which
    has one dimension."""
    # What ``context_parallel`` does beside sharding buffers in place, which the caller has done.
    ring._enable_context_parallel_dispatcher_impl(seq_dim=2, mesh=mesh)
    try:
        yield
    finally:
        ring._disable_context_parallel_dispatcher_impl()
