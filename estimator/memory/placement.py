"""How many ways parallelism divides a model and its states."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, minimum
from estimator.setup import Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How many ways each kind of state is divided over the devices."""

    parameters: Number
    gradients: Number
    optimizer: Number
    gathers: Number
    """Sharded parameters are gathered layer by layer (ZeRO-3, FSDP)."""


def placement(setup: Setup) -> Placement:
    """Divisors of data-parallel sharding (tensor, pipeline and expert parallelism divide the counts before)."""
    shards = setup.shard_size if setup.shard_size is not None else setup.data_ranks * setup.context_parallel
    kind = setup.sharding or "none"
    return Placement(
        parameters=shards if kind in ("zero3", "fsdp") else 1,
        gradients=shards if kind in ("zero2", "zero3", "fsdp") else 1,
        optimizer=shards if kind in ("zero1", "zero2", "zero3", "fsdp") else 1,
        gathers=shards > 1 if kind in ("zero3", "fsdp") else False,
    )


def model_divisors(setup: Setup) -> tuple[Number, Number]:
    """(dense, experts): how many ways model parallelism divides the parameters of a layer; experts over no more than there are
    devices (where tensor-parallel ranks are among the expert-parallel ones, each expert is whole)."""
    dense = setup.tensor_parallel * setup.pipeline_parallel
    return dense, minimum(dense * setup.expert_parallel, setup.accelerators)
