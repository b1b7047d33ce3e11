"""The work of one optimizer step, by kind, from a shape and a setup.  (being written)"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.setup import Setup
from estimator.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Per device and optimizer step. FLOPs count a multiply-add as two; attention is counted in full (not causal)."""

    matmul_flops: float
    """Matrix products of the layers: forward, backward, recomputation."""
    head_flops: float
    """The output projection over the vocabulary."""
    attention_flops: float
    """Scores and weighted sums."""
    elementwise_bytes: float
    """Traffic of norms, activations, rotations, residuals."""
    logits_bytes: float
    """Traffic of the softmax and loss over the vocabulary."""
    optimizer_bytes: float
    """Traffic of clipping, the optimizer's step and zeroing."""
    launches: float
    """Kernels started."""
    model_flops: float
    """All devices, no recomputation: what MFU counts."""


def step_work(shape: ModelShape, setup: Setup) -> StepWork:
    """The work of one step (``setup`` resolved)."""
    raise NotImplementedError
