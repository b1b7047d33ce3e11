"""Which matrices of a model's layers get adapters."""

from __future__ import annotations

import functools

from estimator.conventions import conventions
from estimator.model.layer_facts import layer_facts
from estimator.model.shape import ModelShape, lora_modules
from estimator.setup import Setup

Matrix = tuple[str, int, int]
"""Name, inputs, outputs."""

_FUSED = ("q_proj", "k_proj", "v_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
_DEFAULT = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapted_matrices(shape: ModelShape, setup: Setup, *, moe: bool = False) -> tuple[Matrix, ...]:
    """Of one layer, ``moe``: one with experts. In transformers' models the targets that the family has none of are passed
    over, as peft does, and one projection that makes queries, keys and values is one matrix, ``qkv_proj``. Raises InputError
    for what is no projection."""
    matrices = _adapted(shape, setup.lora_targets, _by_transformers(setup))
    if not (moe and fused_experts(setup)):
        return matrices
    width = shape.shared_experts * shape.ffn
    beside = {"gate_proj": (shape.hidden, width), "up_proj": (shape.hidden, width), "down_proj": (width, shape.hidden)}
    found = tuple((name, *beside.get(name, sizes)) for name, *sizes in matrices)
    return tuple(matrix for matrix in found if width or matrix[0] not in beside)


_UNADAPTED = ("qwen2_moe", "granitemoe", "phimoe")
"""Families whose experts peft leaves alone: it has no names for them (0.21, utils/transformers_weight_conversion.py)."""


def adapted_experts(shape: ModelShape, setup: Setup) -> bool:
    """Whether peft adapts the routed experts, which transformers 5 has in two tensors a layer: it multiplies each adapter out
    and adds it to the experts, so that these stand there a second time."""
    if setup.method not in ("lora", "qlora") or not (shape.experts and fused_experts(setup)):
        return False
    if shape.family in _UNADAPTED:
        return False
    return any(name in _FEED_FORWARD for name, _, _ in adapted_matrices(shape, setup))


def adapts_head(setup: Setup) -> bool:
    """Whether the output projection, which is in no layer, has an adapter."""
    named = (setup.lora_targets or "").replace(",", " ").split()
    return setup.method in ("lora", "dora", "qlora") and any(name.rsplit(".", 1)[-1] == "lm_head" for name in named)


def adapter_parameters(shape: ModelShape, setup: Setup) -> int:
    """Over all layers: rank·(inputs + outputs) a matrix, and with DoRA one magnitude an output. The tensor that holds gate and
    up of all experts has adapters of twice the rank."""
    rank, dora = setup.lora_rank or 0, setup.method == "dora"
    total = 0
    for moe, count in ((False, shape.plain_layers), (True, shape.moe_layers)):
        for name, inputs, outputs in adapted_matrices(shape, setup, moe=moe):
            # Of a hybrid's layers some attend; every feed-forward stands for its share of them.
            layers = count if name in _FEED_FORWARD else count * shape.attention_layers // shape.feed_forwards
            total += layers * (rank * (inputs + outputs) + (outputs if dora else 0))
    if shape.mixer and setup.lora_targets in ("all-linear", "all"):
        into, out = shape.mixer.projected, shape.mixer.values
        total += shape.mixer.layers * (rank * (into + out + 2 * shape.hidden) + (into + shape.hidden if dora else 0))
    if adapts_head(setup):
        total += rank * (shape.hidden + shape.vocab) + (shape.vocab if dora else 0)
    if adapted_experts(shape, setup):
        h, f = shape.hidden, shape.ffn
        total += shape.moe_layers * shape.experts * rank * (2 * (h + (shape.matrices - 1) * f) + f + h)
    return total


def _by_transformers(setup: Setup) -> bool:
    return conventions(setup).written_out_gelu


def fused_experts(setup: Setup) -> bool:
    """As a loss tells: before transformers 4.50 each expert had matrices of its own."""
    return _by_transformers(setup) and setup.logit_copies == "none"


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
