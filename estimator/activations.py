"""What autograd keeps for backward, in bytes per token, layer by layer: read off transformers' modelling code.

Notation as in shape.py, with s the residual stream's element, c the compute element (bytes). "Kept" is what some
backward formula saves; a tensor saved by several is counted once. Checked against the allocator events of real steps
on a CPU (tests) and the A+ rows of the evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.adapters import BITSANDBYTES, adapter_bytes, eight_bit_input_bytes, selective_bytes
from estimator.arrays import Number, maximum, where
from estimator.conventions import conventions
from estimator.hardware import is_cpu
from estimator.setup import Setup
from estimator.shape import ModelShape, lora_modules
from estimator.states import Widths, widths


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
    transient_scores: Number
    """The same of attention's S x S matrices, per token and per token of context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitBytes:
    """Bytes per token over the vocabulary and around it."""

    forward: Number
    """At the end of the loss."""
    backward: Number
    """At the softmax's backward."""
    held: Number
    """By the caller, while the layers' backward runs."""
    evaluation: Number
    """Without gradients."""
    returned: Number
    """What Trainer's conversion of the model's outputs to fp32 adds at the end of the forward pass."""
    converted: Number
    """The half logits with their fp32 copy; 0 where there is none."""
    head_gradients: Number
    """Bytes (not per token) of head gradients that a fused-linear loss holds from the forward pass on."""


def builds_mask(setup: Setup) -> bool:
    """Whether SDPA is given an explicit mask: where the memory-efficient kernel is named, and in the published torch-loop
    (transformers 4.57 takes a single sequence without a mask for a packed one)."""
    if setup.attention != "sdpa" or is_cpu(setup.accelerator):
        return False
    return setup.attention_kernel == "efficient" or (setup.framework == "torch-loop" and setup.attention_kernel is None)


def uses_math_kernel(shape: ModelShape, setup: Setup, *, masked: bool) -> bool:
    """Whether SDPA falls back to plain products: where named, and on a GPU for grouped queries in fp32 without a mask
    (flash is for half precision, and the memory-efficient kernel knows no groups)."""
    if setup.attention not in ("sdpa", "flash") or is_cpu(setup.accelerator):
        return setup.attention_kernel == "math"
    grouped = shape.kv_heads != shape.heads and widths(setup).compute == 4 and not masked
    return setup.attention_kernel == "math" or (grouped and setup.attention_kernel in (None, "flash"))


def _reads_attention(shape: ModelShape, setup: Setup) -> bool:
    """Whether something that trains reads attention's output, which plain products do not keep by themselves."""
    if setup.method in ("full", "freeze"):
        return True
    return any(name == "o_proj" for name, _, _ in lora_modules(shape, setup.lora_targets))


def layer_activations(shape: ModelShape, setup: Setup, *, moe: bool, masked: bool = False) -> LayerActivations:
    """What one layer keeps. ``moe`` chooses the feed-forward of a mixture of experts; ``masked`` see ``builds_mask``."""
    size, convention = widths(setup), conventions(setup)
    tensor = setup.tensor_parallel
    h = float(shape.hidden)
    q, kv, v = (width / tensor for width in (shape.query_width, shape.kv_width, shape.value_width))
    kv = maximum(kv, shape.head_dim)
    trains = setup.method in ("full", "freeze")
    norms = _norms(shape, setup, size, trains) / tensor  # split by sequence in Megatron's and DTensor's plans
    s, c = size.stream, size.compute

    # Attention: q, k, v after rotation and the output; the output is also what the o projection keeps.
    attention = c * (q + 2 * kv + v)
    if shape.latent_attention:
        # The compressed streams and their norms, and keys and values expanded to every head.
        rank = shape.q_lora_rank + shape.kv_lora_rank
        attention = c * (2 * q + 2 * v) + (s + 2 * c) * rank
    if shape.qk_norm:
        # The norm of q and k before rotation: fp32 input and the normalised tensor.
        attention += (4 + (c if trains else 0)) * (q + kv)
    if convention.repeats_kv and shape.kv_heads != shape.heads:
        attention += c * 2 * (q - kv)
    elif convention.keeps_frozen_inputs:  # the values are a view of the fused projection's output
        attention += c * (q + kv)
    heads = shape.heads / tensor
    scores: Number = 0.0
    transient_scores: Number = 0.0
    plain_products = setup.attention == "eager" or uses_math_kernel(shape, setup, masked=masked)
    if setup.attention == "eager":
        # softmax in fp32, and its cast for the product with V; k and v repeated for every query head. In backward the
        # softmax's two gradients are fp32, when the cast is gone.
        scores = heads * (4 + (c if c != 4 else 0))
        transient_scores = heads * (8 - (c if c != 4 else 0))
        if shape.family == "bert":  # its configs drop 10% out: of the softmax too, which keeps result and mask
            scores += heads * (c + 1)
        if shape.kv_heads != shape.heads:
            attention += c * 2 * (q - kv)
        attention -= 0.0 if _reads_attention(shape, setup) else c * v
    elif plain_products:
        scores, transient_scores = heads * 4.0, heads * 8.0
        attention = 4 * 3 * q + (c * v if _reads_attention(shape, setup) else 0.0)  # in fp32, k and v repeated
    else:
        attention += 4 * heads  # log-sum-exp
        if masked:
            # An explicit mask sends SDPA to the memory-efficient kernel, with k and v repeated for every query head and
            # the mask, cast to the compute type, kept by every layer.
            attention += c * 2 * (q - kv)
            scores = c

    selective, fixed = selective_bytes(shape, setup, size)
    if shape.family == "bert":
        attention += 2 * h / tensor  # the masks of its two other dropouts
    mlp, mlp_transient = _feed_forward(shape, setup, size, moe=moe)
    kept = norms + attention + mlp
    if not trains:
        kept += adapter_bytes(shape, setup, size)
    # Backward is through with the feed-forward when it comes to attention.
    attention_transient = c * (q + 2 * kv + v) + s * h / tensor
    eight_bit = eight_bit_input_bytes(shape, setup, size)
    kept += eight_bit
    return LayerActivations(
        kept=kept,
        scores=scores,
        selective=selective / tensor + s * h / tensor,
        selective_fixed=fixed / tensor,
        layer_input=s * h / tensor,
        selective_scores=c * heads if plain_products else 0.0,
        quantized_inputs=eight_bit,
        mlp=mlp,
        transient=mlp_transient,
        attention_transient=attention_transient,
        transient_scores=transient_scores,
    )


def _norms(shape: ModelShape, setup: Setup, size: Widths, trains: bool) -> Number:
    """The layer's norms with the residual stream they read and the inputs that the projections keep of them.

    RMSNorm in transformers: the input in fp32 (the stream itself where that is fp32), the normalised tensor (kept by
    the product with the trained weight), the output (kept by every projection that is trained). Under autocast each
    projection casts that output anew, and keeps its own copy. torch's LayerNorm keeps only its input.
    """
    h = shape.hidden
    s, c = size.stream, size.compute
    # An fp32 stream is its own fp32 input; of a half stream RMSNorm keeps a copy.
    per_norm = 4.0 + (s if trains else 0.0) if shape.rms_norm and not conventions(setup).fused_layers else s
    copies = 0.0
    if trains:
        readers = (3, 2 if shape.gated else 1) if size.casts_weights else (1, 1)
        if shape.family in ("gpt2", "gpt", "gpt_neox", "gpt_bigcode", "falcon", "bloom", "mpt"):
            readers = (1, 1)  # one fused q, k, v projection
        copies = sum(readers) * c
        if shape.norms_per_layer == 1:
            copies = c * max(readers)
    return h * (shape.norms_per_layer * per_norm + copies)


def _feed_forward(shape: ModelShape, setup: Setup, size: Widths, *, moe: bool) -> tuple[Number, Number]:
    """(kept, transient) bytes per token of the feed-forward.

    Gated: gate, its activation, up, and their product (kept by a trained down projection). Plain: the input of the
    activation and its output.
    """
    c = size.compute
    if setup.base_quantization in BITSANDBYTES and size.casts_weights:
        c = size.stream  # their products return their input's type
    trains = setup.method in ("full", "freeze")
    if not moe:
        width = shape.plain_ffn / setup.tensor_parallel
        tensors = (4 if trains else 3) if shape.gated else (2 if trains else 1)
        if conventions(setup).keeps_frozen_inputs:
            tensors = 4 if shape.gated else 2
        if shape.gated and conventions(setup).fused_layers:
            tensors = 3 if trains else 2  # one kernel from the first products to the last one's input
        if shape.gated and setup.compile:
            tensors = 2  # what lies between the products is recomputed in backward's kernels
        written_out = conventions(setup).written_out_gelu and not setup.compile
        if not shape.gated and written_out and shape.family in ("gpt2", "phi", "gpt_bigcode", "bloom"):
            tensors += 3  # the tanh form of GELU written out: cube, tanh and its factors
        return c * tensors * width, c * 3 * width
    if size.casts_weights:
        c = size.stream  # autocast does not reach the products of grouped experts
    # Every token is in `active` experts and the shared ones; the routed copies of the hidden state are kept too.
    routed = (shape.active_experts + shape.shared_experts) * shape.ffn / setup.tensor_parallel
    # Frozen, neither the experts' inputs nor the down projection's are.
    tensors = (4 if trains else 3) if shape.gated else (2 if trains else 1)
    router = 4.0 * 2 * shape.experts
    hidden = (2 if trains or size.casts_weights else 1) * c * shape.hidden * shape.active_experts
    return c * tensors * routed + hidden + router, c * 3 * routed


def logit_bytes(shape: ModelShape, setup: Setup) -> LogitBytes:
    """The vocabulary's chain. ``standard`` in transformers: logits, their fp32 copy (where they are half), the
    log-softmax, and in backward the gradients of both; the logits themselves live on where the caller holds the
    output (torch-loop) but not in Trainer, which drops it with ``compute_loss``.
    """
    size = widths(setup)
    vocab = shape.vocab / setup.tensor_parallel
    c = size.compute
    convention = conventions(setup)
    copy = 4.0 if c != 4 and convention.upcasts_logits else 0.0
    converts = setup.framework == "hf-trainer" and size.autocast and setup.logit_copies == "none"
    held: Number = c if convention.holds_logits and setup.loss != "chunked" else 0.0
    if convention.parallel_loss:  # exp and its sum with the gradient are one more tensor for a moment
        held = held + where(setup.tensor_parallel > 1, 4.0, 0.0)
    forward, backward = _loss_chain(setup, c=c, copy=copy, held=held)
    linear = setup.loss in ("fused-linear", "cut-cross-entropy")
    head_gradients = shape.vocab * shape.hidden * size.stream if linear and setup.method == "full" else 0.0
    return LogitBytes(
        forward=forward * vocab,
        backward=backward * vocab,
        held=held * vocab if forward else 0.0,
        returned=4.0 * vocab if converts and setup.loss in ("fused-kernel", "compiled") else 0.0,
        evaluation=(c + copy + 4.0) * vocab,
        converted=(c + copy if copy else 0.0) * vocab,
        head_gradients=head_gradients / setup.tensor_parallel,
    )


def _loss_chain(setup: Setup, *, c: float, copy: float, held: Number) -> tuple[Number, Number]:
    """Bytes a logit (at the end of the loss, in its backward): ``c`` of the logits, ``copy`` of their fp32 copy, ``held``
    by the caller."""
    convention = conventions(setup)
    copies = setup.logit_copies != "none"
    shifted = where(setup.batch > 1, 4.0, 0.0) if copies else 0.0  # a single sequence without its end needs no copy
    half = c if setup.logit_copies == "shifted-and-half" else 0.0
    if setup.loss == "standard":
        return (half + copy + shifted if copies else c + copy) + 4, held + 12.0
    if setup.loss == "chunked":
        if convention.separate_losses:  # as many log-softmaxes, then gradients, as logits
            return 2 * c, 2 * c
        if setup.compile:  # one kernel a chunk
            return c, 2 * c
        # torchtune: eight chunks, upcast and normalised one by one; the logits are dropped before backward.
        return c + 4 + copy / 8, 4 + (4 + copy) / 8
    if setup.loss == "fused-kernel":  # in place on the fp32 copy, whose gradient is cast back
        if copies and copy:
            return half + copy + shifted, 4 + c
        return c + copy, held + copy + c if copy else c
    if setup.loss == "compiled":  # one pass reads the logits and writes their gradient
        return c, 2 * c
    return 0.0, 0.0  # fused-linear, cut-cross-entropy: the logits never exist at once


def head_input_bytes(shape: ModelShape, setup: Setup) -> Number:
    """Bytes per token that the last norm and the head keep."""
    size = widths(setup)
    trains = setup.method == "full"
    norm = (4.0 + (size.stream if trains else 0.0)) if shape.rms_norm else size.stream
    kept = size.compute if trains else 0.0
    return shape.hidden * (norm + kept) / setup.tensor_parallel
