"""Which matrices of a model's layers get adapters."""

from __future__ import annotations

import functools

from estimator.conventions import conventions
from estimator.layer_facts import layer_facts
from estimator.setup import Setup
from estimator.shape import ModelShape, lora_modules

Matrix = tuple[str, int, int]
"""Name, inputs, outputs."""

_FUSED = ("q_proj", "k_proj", "v_proj")
_DEFAULT = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapted_matrices(shape: ModelShape, setup: Setup) -> tuple[Matrix, ...]:
    """Of one layer. In transformers' models the targets that the family has none of are passed over, as peft does, and one
    projection that makes queries, keys and values is one matrix, ``qkv_proj``. Raises InputError for what is no projection."""
    return _adapted(shape, setup.lora_targets, conventions(setup).written_out_gelu)


def adapter_parameters(shape: ModelShape, setup: Setup) -> int:
    """Over all layers: rank·(inputs + outputs) a matrix, and with DoRA one magnitude an output."""
    rank, dora = setup.lora_rank or 0, setup.method == "dora"
    matrices = adapted_matrices(shape, setup)
    return shape.layers * sum(rank * (inputs + outputs) + (outputs if dora else 0) for _, inputs, outputs in matrices)


@functools.cache
def _adapted(shape: ModelShape, targets: str | None, by_transformers: bool) -> tuple[Matrix, ...]:
    matrices = lora_modules(shape, targets)
    if not by_transformers:
        return matrices
    facts = layer_facts(shape.family)
    wanted = _DEFAULT if targets is None else targets.replace(",", " ").split()
    present = [name for name in wanted if name.rsplit(".", 1)[-1] in facts.modules or name in ("all", "all-linear")]
    if present:
        matrices = lora_modules(shape, " ".join(present))
    fused = [matrix for matrix in matrices if matrix[0] in _FUSED]
    if not facts.fused_qkv or not fused:
        return matrices
    outputs = shape.query_width + 2 * shape.kv_width
    return ("qkv_proj", shape.hidden, outputs), *(matrix for matrix in matrices if matrix[0] not in _FUSED)
