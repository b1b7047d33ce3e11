"""What FSDP2 adds to tensors whose first dimension its ranks do not divide (``fully_shard``, ``_fsdp_param.py``).

It cuts the first dimension into chunks of equal rows, rounded up, and pads what is gathered and reduced to a chunk for every
rank: 8 stacked experts over 64 ranks are one on each of the first 8, and 64 of them in the buffers.
"""

from __future__ import annotations

from estimator.arrays import Number, ceil, where
from estimator.conventions import shards_flat
from estimator.memory.placement import Placement, model_divisors
from estimator.model.lora_targets import adapted_matrices, fused_experts
from estimator.model.shape import ModelShape, count_parameters
from estimator.setup import Setup


def padding(shape: ModelShape, setup: Setup, place: Placement) -> tuple[Number, Number]:
    """Elements that the fullest rank has more of, times the ranks, and that buffers of the whole model have more of: (of the
    model's own tensors, of trained ones). Those of routed experts and of adapters' first matrices, which have ``rank`` rows."""
    experts = _experts(shape, setup, place)
    if setup.method == "full":
        return experts, experts
    if setup.method == "freeze":
        return experts, experts * (setup.trainable_layers or 0) / shape.layers
    if setup.method not in ("lora", "dora", "qlora") or not setup.lora_rank:
        return experts, 0.0
    first = sum(
        layers * setup.lora_rank * inputs
        for moe, layers in ((False, shape.plain_layers), (True, shape.moe_layers))
        if layers
        for _, inputs, _ in adapted_matrices(shape, setup, moe=moe)
    )
    return experts, first / model_divisors(setup)[0] * _share(setup, place, setup.lora_rank)


def _experts(shape: ModelShape, setup: Setup, place: Placement) -> Number:
    """Where a layer's are stacked. Ranks that share experts out split what is left of these by columns (torchtitan's ``Shard(1)``)."""
    if not shape.experts or not fused_experts(setup):
        return 0.0
    experts = count_parameters(shape).experts / model_divisors(setup)[1]
    return where(setup.expert_parallel > 1, 0.0, experts * _share(setup, place, shape.experts))


def _share(setup: Setup, place: Placement, rows: int) -> Number:
    """Of a tensor of so many rows, to each of its elements."""
    if setup.sharding != "fsdp" or shards_flat(setup):
        return 0.0
    return ceil(rows / place.parameters) * place.parameters / rows - 1.0
