"""What attention keeps for backward, in bytes per token of one layer. Notation as in activations.py."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, either, maximum, where
from estimator.conventions import conventions
from estimator.hardware import is_cpu
from estimator.memory.widths import Widths, copies_inputs, input_width, widths
from estimator.model.layer_facts import layer_facts
from estimator.model.lora_targets import adapted_matrices
from estimator.model.shape import ModelShape
from estimator.setup import Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBytes:
    """Bytes per token; of scores, per token and per token of context."""

    kept: Number
    scores: Number
    """S x S matrices and masks that are kept."""
    transient_scores: Number
    """Momentary ones of backward, beyond those."""
    first_product: Number
    """The scores as the first product leaves them."""
    spent: Number = 0.0
    """Of ``kept``, attention's output, which backward is through with when it comes to the softmax (the values, too, but then their
    gradient is there)."""


def builds_mask(setup: Setup) -> bool:
    """Whether SDPA is given an explicit mask: where sequences are padded, where the memory-efficient kernel is named, and in the
    published torch-loop (transformers 4.57 takes a single sequence without a mask for a packed one)."""
    if setup.attention == "sdpa" and not setup.pack:
        return True
    if setup.attention != "sdpa" or is_cpu(setup.accelerator):
        return False
    return setup.attention_kernel == "efficient" or (setup.framework == "torch-loop" and setup.attention_kernel is None)


def uses_math_kernel(shape: ModelShape, setup: Setup, *, masked: bool) -> bool:
    """Whether SDPA falls back to plain products: where named, for a lone key that it is to broadcast, and on a GPU for grouped
    queries in fp32 without a mask (flash is for half precision, and the memory-efficient kernel knows no groups)."""
    if setup.attention == "sdpa" and setup.attention_kernel is None and _broadcasts_lone_key(shape, setup):
        return True
    if setup.attention not in ("sdpa", "flash") or is_cpu(setup.accelerator):
        return setup.attention_kernel == "math"
    grouped = shape.kv_heads != shape.heads and widths(setup).compute == 4 and not masked
    return setup.attention_kernel == "math" or (grouped and setup.attention_kernel in (None, "flash"))


def _broadcasts_lone_key(shape: ModelShape, setup: Setup) -> bool:
    """Falcon's first layout in transformers' code: one key head beside many of queries, which no fused kernel takes."""
    return shape.family == "falcon" and shape.kv_heads == 1 and shape.heads > 1 and conventions(setup).written_out_gelu


def attention_bytes(shape: ModelShape, setup: Setup, size: Widths, *, masked: bool) -> AttentionBytes:
    """``masked``: SDPA is given a mask."""
    capped = layer_facts(shape.family).score_cap and conventions(setup).writes_out_caps
    if setup.attention == "eager" or capped:
        return _eager(shape, setup, size)
    if uses_math_kernel(shape, setup, masked=masked):
        return _math(shape, setup, size)
    c, heads = size.compute, shape.heads / setup.tensor_parallel
    q, kv, v = _shares(shape, setup)
    kept = _projected(shape, setup, size) + 4 * heads  # log-sum-exp
    if masked:
        # An explicit mask sends SDPA to the memory-efficient kernel, with k and v repeated for every query head and
        # the mask, cast to the compute type, kept by every layer.
        return AttentionBytes(kept=kept + c * 2 * (q - kv), scores=c, transient_scores=0.0, first_product=0.0)
    if _puts_together(shape, setup) and _reads_attention(shape, setup) and not copies_inputs(setup, size):
        kept += c * v  # the kernel's output lies as its queries do, head by head: the o projection keeps a copy
    low = input_width(setup, size)
    if setup.method == "full" and low != c:  # the o projection's own, beside the output
        kept += low * v
    return AttentionBytes(kept=kept, scores=0.0, transient_scores=0.0, first_product=0.0)


def _shares(shape: ModelShape, setup: Setup) -> tuple[Number, Number, Number]:
    """Widths of queries, of keys, and of attention's output on one device."""
    q, kv, v = (width / setup.tensor_parallel for width in (shape.query_width, shape.kv_width, shape.value_width))
    return q, maximum(kv, shape.head_dim), v


def _puts_together(shape: ModelShape, setup: Setup) -> bool:
    own_code = conventions(setup).written_out_gelu and not is_cpu(setup.accelerator)
    return own_code and layer_facts(shape.family).rotation == "cat"


def _projected(shape: ModelShape, setup: Setup, size: Widths) -> Number:
    """q, k, v after rotation and the output; the output is also what the o projection keeps."""
    facts, convention, c = layer_facts(shape.family), conventions(setup), size.compute
    q, kv, v = _shares(shape, setup)
    attention = c * (q + 2 * kv + v)
    if shape.latent_attention:
        # The compressed streams' norms; keys put together; values, a view of what keys and values are expanded to.
        rank = shape.q_lora_rank + shape.kv_lora_rank
        expanded = v + shape.heads * shape.qk_nope_head_dim / setup.tensor_parallel
        attention = c * (2 * q + v + expanded) + (4 + (2 * c if setup.method in ("full", "freeze") else 0)) * rank
    attention += _head_norms(shape, setup, size) * (q + kv)
    if convention.repeats_kv and shape.kv_heads != shape.heads:
        attention += c * 2 * (q - kv)
    elif convention.keeps_frozen_inputs or (
        facts.fused_qkv and facts.rotation != "none" and convention.written_out_gelu and not setup.compile
    ):  # the values are a view of the fused projection's output
        attention += c * (q + kv)
    if shape.family == "bert":
        attention += 2 * shape.hidden / setup.tensor_parallel  # the masks of its two other dropouts
    return attention


def _head_norms(shape: ModelShape, setup: Setup, size: Widths) -> Number:
    """Bytes of an element of queries and keys: of their norm before rotation the fp32 input and the normalised tensor."""
    if not shape.qk_norm:
        return 0.0
    if setup.compile:  # it is recomputed
        return size.compute
    normalised = 4 if layer_facts(shape.family).norm == "rms-fp32" else size.compute
    return 4 + (normalised if setup.method in ("full", "freeze") else 0)


def _eager(shape: ModelShape, setup: Setup, size: Widths) -> AttentionBytes:
    """k and v repeated for every query head, copied out of fused projections; the softmax, and its cast for the product with
    V. In backward the softmax's two gradients have its width, when the cast is gone."""
    facts, c, heads = layer_facts(shape.family), size.compute, shape.heads / setup.tensor_parallel
    q, _, v = _shares(shape, setup)
    softmax = {"fp32": 4.0, "stream": size.stream}[facts.softmax]
    cast = c if softmax != c else 0.0
    scores = softmax + cast + (c if facts.score_cap else 0.0)
    if setup.compile:  # the partitioner keeps both products' scores in their own type
        scores = 2 * c
    if shape.family == "bert":  # its configs drop 10% out: of the softmax too, which keeps result and mask
        scores += c + 1
    _, kv, _ = _shares(shape, setup)
    output = c * v if _reads_attention(shape, setup) else 0.0
    kept = _projected(shape, setup, size) - (c * v - output)
    if shape.kv_heads != shape.heads:
        kept += c * 2 * (q - kv)
    if facts.fused_qkv and facts.rotation != "none" and conventions(setup).written_out_gelu and not setup.compile:
        # Nothing is a view of the fused output any more, but for the values of a single sequence, which no product has to copy.
        copied = either(shape.kv_heads != shape.heads, setup.batch > 1)
        kept = kept - where(copied, c * (q + kv), 0.0)
    return AttentionBytes(
        kept=kept,
        scores=heads * scores,
        transient_scores=heads * (2 * softmax - cast),
        # Bloom adds the products to its biases, with an operator that no list of costly ones has.
        first_product=0.0 if shape.family == "bloom" else c * heads,
        spent=output,
    )


def _math(shape: ModelShape, setup: Setup, size: Widths) -> AttentionBytes:
    """SDPA's plain products: in fp32, k and v repeated."""
    heads = shape.heads / setup.tensor_parallel
    q, kv, v = _shares(shape, setup)
    output = size.compute * v if _reads_attention(shape, setup) else 0.0
    kept = 4 * 3 * q + output + _head_norms(shape, setup, size) * (q + kv)
    return AttentionBytes(
        kept=kept,
        scores=heads * 4.0,
        transient_scores=heads * 8.0,
        first_product=size.compute * heads,
        spent=output,
    )


def _reads_attention(shape: ModelShape, setup: Setup) -> bool:
    """Whether something keeps attention's output as its input, which plain products do not by themselves."""
    if setup.method in ("full", "freeze") or setup.base_quantization == "int8":
        return True
    return any(name == "o_proj" for name, _, _ in adapted_matrices(shape, setup))
