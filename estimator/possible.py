"""Setups that no framework can run with a given model: refused in one line each, before anything is predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from estimator.arrays import Number, either
from estimator.errors import InputError
from estimator.model.shape import ModelShape
from estimator.setup import Setup


def check_possible(shape: ModelShape, setup: Setup) -> None:
    """Raises InputError that names the setting and what to write (``setup`` resolved)."""
    for holds, problem in _rules(shape, setup):
        if not holds:
            raise InputError(problem())


def check_by_code(shape: ModelShape, setup: Setup) -> None:
    """Raises InputError for what needs more of a model than its own code tells: which parameters are in which matrices."""
    known = {
        "method": "full",
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "expert_parallel": 1,
        "context_parallel": 1,
    }
    for name, value in known.items():
        if getattr(setup, name) != value:
            raise InputError(
                f"{name}: {shape.name} is known by its code alone, which says nothing of {getattr(setup, name)}; write {value}"
            )


def possible(shape: ModelShape, setup: Setup) -> Number:
    """Whether every rule holds; an array where the setup's numbers are arrays."""
    answer: Any = True
    for holds, _ in _rules(shape, setup):
        answer = answer & holds
    return answer


def _rules(shape: ModelShape, setup: Setup) -> Iterator[tuple[Number, Callable[[], str]]]:
    """(whether it holds, what is wrong otherwise); nobody asks a grid what is wrong."""
    tensor, pipeline, expert = setup.tensor_parallel, setup.pipeline_parallel, setup.expert_parallel
    yield (
        pipeline <= shape.layers,
        lambda: (
            f"pipeline_parallel: {pipeline} stages are more than the {shape.layers} layers of {shape.name}; "
            f"write --pipeline-parallel {shape.layers} or less"
        ),
    )
    if not shape.inferred:
        yield (
            shape.heads % tensor == 0,
            lambda: (
                f"tensor_parallel: {tensor} ranks do not divide the {shape.heads} attention heads of {shape.name}; "
                f"write --tensor-parallel with a divisor of {shape.heads}"
            ),
        )
    else:
        yield (
            tensor <= shape.heads,
            lambda: (
                f"tensor_parallel: {tensor} ranks are more than {shape.heads} attention heads; "
                f"write --tensor-parallel {shape.heads} or less"
            ),
        )
    if shape.experts:
        yield (
            shape.experts % expert == 0,
            lambda: (
                f"expert_parallel: {expert} ranks do not divide the {shape.experts} experts of {shape.name}; "
                f"write --expert-parallel with a divisor of {shape.experts}"
            ),
        )
        stage = setup.accelerators // pipeline  # its other ranks hold the same layers, and share the experts
        yield (
            stage % expert == 0,
            lambda: (
                f"expert_parallel: {expert} ranks do not divide the {stage} accelerators "
                + ("of a pipeline stage" if pipeline > 1 else "there are")
                + f"; write --expert-parallel with a divisor of both {stage} and {shape.experts}"
            ),
        )
    else:
        yield (
            expert == 1,
            lambda: f"expert_parallel: {shape.name} has no experts; leave --expert-parallel out",
        )
    context = setup.context_parallel
    # Ring attention gives each rank a piece from either end, so that causal work is even: torch's head-tail balancer,
    # torchtitan's seq_len_divisor and Megatron's check of its arguments all ask for it.
    yield (
        either(context == 1, setup.seq % (2 * context) == 0),
        lambda: (
            f"context_parallel: {context} ranks share a sequence as {2 * context} even pieces, which {setup.seq} tokens are "
            f"not; write --seq {-(-setup.seq // (2 * context)) * 2 * context}"
        ),
    )
    yield (
        setup.base_quantization != "int8" or str(setup.sharding) not in ("zero3", "fsdp"),
        lambda: (
            f"base_quantization: int8 weights cannot be sharded by {setup.sharding}, as bitsandbytes stores none but 4-bit "
            "ones in a type that can be; write --quantization nf4, or --sharding ddp"
        ),
    )
    if setup.shard_size is not None:
        ranks = setup.data_ranks * setup.context_parallel
        yield (
            ranks % setup.shard_size == 0,
            lambda: (
                f"shard_size: {setup.shard_size} does not divide the {ranks} data-parallel ranks; "
                f"write --shard-size with a divisor of {ranks}"
            ),
        )
    if setup.lora_rank is not None:
        yield (
            setup.lora_rank <= shape.hidden,
            lambda: (
                f"lora_rank: {setup.lora_rank} is more than the width of {shape.name}; write --lora-rank {shape.hidden} or less"
            ),
        )
