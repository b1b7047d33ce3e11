"""Setups that no framework can run with a given model: refused in one line each, before anything is predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from estimator.arrays import Number
from estimator.errors import InputError
from estimator.model.shape import ModelShape
from estimator.setup import Setup


def check_possible(shape: ModelShape, setup: Setup) -> None:
    """Raises InputError that names the setting and what to write (``setup`` resolved)."""
    for holds, problem in _rules(shape, setup):
        if not holds:
            raise InputError(problem())


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
    else:
        yield (
            expert == 1,
            lambda: f"expert_parallel: {shape.name} has no experts; leave --expert-parallel out",
        )
    yield (
        setup.context_parallel <= setup.seq,
        lambda: (
            f"context_parallel: {setup.context_parallel} ranks are more than the {setup.seq} tokens of a sequence; "
            "write a smaller --context-parallel"
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
