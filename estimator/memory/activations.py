"""What autograd keeps for backward, in bytes per token, layer by layer: read off transformers' modelling code.

Notation as in shape.py, with s the residual stream's element, c the compute element (bytes). "Kept" is what some
backward formula saves; a tensor saved by several is counted once. Checked against the allocator events of real steps
on a CPU (tests) and the A+ rows of the evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number
from estimator.conventions import conventions, stream_ranks
from estimator.memory.adapters import FEED_FORWARD, OUTPUT, adapter_bytes, eight_bit_input_bytes, selective_bytes
from estimator.memory.attention import attention_bytes, builds_mask
from estimator.memory.feed_forward import feed_forward_bytes
from estimator.memory.hybrid import branch_shares, mixer_bytes
from estimator.memory.widths import Widths, input_width, widths
from estimator.model.layer_facts import layer_facts
from estimator.model.shape import ModelShape
from estimator.setup import Setup

__all__ = ["LayerActivations", "builds_mask", "layer_activations"]


_NORM_TENSORS = 5
"""As wide as the stream, in fp32: what the backward of transformers' RMSNorm has at once, written in single operators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivations:
    """Bytes per token of one decoder layer (of this device's share of it)."""

    kept: Number
    """Saved for backward when the layer is not checkpointed, without attention's S x S matrices."""
    scores: Number
    """Saved attention matrices and masks, per token and per token of context."""
    selective: Number
    """Saved where checkpointing is selective: attention's output, and of the matrix products every second."""
    selective_fixed: Number
    """The same of DoRA's norms, in bytes whatever the tokens."""
    selective_scores: Number
    """The same of eager attention's first product, per token and per token of context."""
    quantized_inputs: Number
    """Saved outside of autograd's hooks, where checkpointing does not reach them."""
    layer_input: Number
    """The residual stream that enters the layer: what full checkpointing saves instead."""
    mlp: Number
    """Of ``kept``, the feed-forward's: backward frees it before it comes to attention."""
    transient: Number
    """The largest momentary tensors of the feed-forward's backward beyond what the layer keeps."""
    attention_transient: Number
    """The same of attention's backward."""
    softmax_transient: Number
    """The same of the softmax's within it, beside its S x S matrices; it can be negative."""
    norm_transient: Number
    """The same of the backward of the norm between the two."""
    shared: Number
    """Of ``kept``, the residual stream that enters the layer, where the first norm keeps that itself."""
    transient_scores: Number
    """The same of attention's S x S matrices, per token and per token of context."""


def layer_activations(shape: ModelShape, setup: Setup, *, moe: bool, masked: bool = False) -> LayerActivations:
    """What one layer keeps. ``moe`` chooses the feed-forward of a mixture of experts; ``masked`` see ``builds_mask``."""
    size, tensor, h = widths(setup), setup.tensor_parallel, float(shape.hidden)
    s, c = size.stream, size.compute
    q, kv, v = (width / tensor for width in (shape.query_width, shape.kv_width, shape.value_width))
    trains = setup.method in ("full", "freeze")
    shared = stream_ranks(setup)
    layers, attending = branch_shares(shape)
    norms = layers * _norms(shape, setup, size, moe=moe) / shared
    if trains and conventions(setup).parallel_loss:
        # DTensor keeps whole what the projections read; Megatron gathers it again.
        norms = norms + c * h * min(shape.norms_per_layer, 2) * (1 - 1 / tensor)
    attention = attention_bytes(shape, setup, size, masked=masked)
    selective, fixed = selective_bytes(shape, setup, size, moe=moe)
    mlp, mlp_transient = feed_forward_bytes(shape, setup, size, moe=moe)
    kept = norms + attending * attention.kept + mixer_bytes(shape, setup, size) + mlp
    spent = attending * attention.spent
    if not trains:
        kept += adapter_bytes(shape, setup, size, moe=moe)
        mlp += adapter_bytes(shape, setup, size, moe=moe, among=FEED_FORWARD)
        spent += adapter_bytes(shape, setup, size, moe=moe, among=OUTPUT)
    # Backward is through with the feed-forward and its norm when it comes to attention.
    stream = s * h / shared - norms / 2
    writes_norms = shape.rms_norm and not conventions(setup).fused_layers and not setup.compile
    eight_bit = eight_bit_input_bytes(shape, setup, size)
    kept += eight_bit
    return LayerActivations(
        kept=kept,
        scores=attending * attention.scores,
        selective=selective / tensor + layers * s * h / shared,
        selective_fixed=fixed / tensor,
        layer_input=layers * s * h / shared,
        selective_scores=attention.first_product,
        quantized_inputs=eight_bit + (c * v if eight_bit else 0.0),  # attention's output, which it keeps anyway
        mlp=mlp,
        transient=mlp_transient + s * h / shared,  # the stream's own gradient
        attention_transient=c * (q + 2 * kv + v) + stream,
        softmax_transient=stream - spent,
        norm_transient=(_NORM_TENSORS * 4 + s) * h / tensor if writes_norms and s != 4 else 0.0,
        shared=s * h / tensor if s == 4 or not writes_norms else 0.0,
        transient_scores=attention.transient_scores,
    )


def _norms(shape: ModelShape, setup: Setup, size: Widths, *, moe: bool) -> Number:
    """The layer's norms with the residual stream they read and the inputs that the projections keep of them.

    RMSNorm in transformers: the input in fp32 (the stream itself where that is fp32), the normalised tensor (kept by
    the product with the trained weight), the output (kept by every projection that is trained). Under autocast each
    projection casts that output anew, and keeps its own copy. torch's LayerNorm keeps only its input.
    """
    facts, count = layer_facts(shape.family), shape.norms_per_layer
    s, c, trains = size.stream, size.compute, setup.method in ("full", "freeze")
    if facts.norm == "layer" or not shape.rms_norm or conventions(setup).fused_layers:
        kept = s * (1 if facts.one_stream else count)
    else:  # an fp32 stream is its own fp32 input; of a half stream RMSNorm keeps a copy
        normalised = 4.0 if facts.norm == "rms-fp32" else s
        kept = count * (4.0 + (normalised if trains else 0.0))
    if (
        setup.compile and shape.rms_norm
    ):  # recomputed from the stream, which is kept at each sum; products keep what they read
        return shape.hidden * (s * count + (c * min(count, 2) if trains else 0.0))
    if setup.compile and not trains:
        return shape.hidden * s * count
    if trains and size.casts_weights and not setup.compile:
        feed_forward = 1 + (2 if shape.shared_experts else 0) if moe else shape.matrices - 1
        kept += c * ((1 if facts.fused_qkv else 3) + feed_forward)
    elif trains:  # a router reads what routed copies are made of
        kept += sum(c if moe and norm else input_width(setup, size) for norm in range(min(count, 2)))
    return shape.hidden * kept
