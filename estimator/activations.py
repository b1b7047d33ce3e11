"""What autograd keeps for backward, in bytes per token, layer by layer: read off transformers' modelling code.

Notation as in shape.py, with s the residual stream's element, c the compute element (bytes). "Kept" is what some
backward formula saves; a tensor saved by several is counted once. Checked against the allocator events of real steps
on a CPU (tests) and the A+ rows of the evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, maximum
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
    layer_input: Number
    """The residual stream that enters the layer: what full checkpointing saves instead."""
    transient: Number
    """The largest momentary tensors of the layer's forward or backward beyond what it keeps."""
    transient_scores: Number
    """The same of eager attention, per token and per token of context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitBytes:
    """Bytes per token over the vocabulary and around it."""

    forward: Number
    """At the end of the loss."""
    backward: Number
    """At the softmax's backward."""
    kept: Number
    """From the end of the forward pass to the start of backward."""
    evaluation: Number
    """Without gradients."""
    head_gradients: Number
    """Bytes (not per token) of head gradients that a fused-linear loss holds from the forward pass on."""


def builds_mask(setup: Setup) -> bool:
    """Whether SDPA is given an explicit mask: where the memory-efficient kernel is named, and in the published torch-loop
    (transformers 4.57 takes a single sequence without a mask for a packed one)."""
    if setup.attention != "sdpa" or is_cpu(setup.accelerator):
        return False
    return setup.attention_kernel == "efficient" or (setup.framework == "torch-loop" and setup.attention_kernel is None)


def layer_activations(shape: ModelShape, setup: Setup, *, moe: bool, masked: bool = False) -> LayerActivations:
    """What one layer keeps. ``moe`` chooses the feed-forward of a mixture of experts; ``masked`` see ``builds_mask``."""
    size = widths(setup)
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
        attention += (4 + c) * (q + kv)
    heads = shape.heads / tensor
    scores: Number = 0.0
    transient_scores: Number = 0.0
    if setup.attention == "eager" or setup.attention_kernel == "math":
        # softmax in fp32, and its cast for the product with V; k and v repeated for every query head.
        scores = heads * (4 + (c if c != 4 else 0))
        transient_scores = heads * 2 * c
        if shape.kv_heads != shape.heads:
            attention += c * 2 * (q - kv)
    else:
        attention += 4 * heads  # log-sum-exp
        if masked:
            # An explicit mask sends SDPA to the memory-efficient kernel, with k and v repeated for every query head and
            # the mask, cast to the compute type, kept by every layer.
            attention += c * 2 * (q - kv)
            scores = c

    mlp, mlp_transient = _feed_forward(shape, setup, size, moe=moe)
    kept = norms + attention + mlp
    if not trains:
        kept += _adapters(shape, setup, size)
    transient = maximum(mlp_transient, c * (q + 2 * kv + v) + s * h / tensor)
    return LayerActivations(
        kept=kept,
        scores=scores,
        layer_input=s * h / tensor,
        transient=transient,
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
    per_norm = 4.0 + (s if trains else 0.0) if shape.rms_norm else s
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
    trains = setup.method in ("full", "freeze")
    if not moe:
        width = shape.plain_ffn / setup.tensor_parallel
        tensors = (4 if trains else 3) if shape.gated else (2 if trains else 1)
        if not shape.gated and shape.family in ("gpt2", "phi", "gpt_bigcode", "bloom"):
            tensors += 3  # the tanh form of GELU written out: cube, tanh and its factors
        return c * tensors * width, c * 3 * width
    # Every token is in `active` experts and the shared ones; the routed copies of the hidden state are kept too.
    routed = (shape.active_experts + shape.shared_experts) * shape.ffn / setup.tensor_parallel
    tensors = 4 if shape.gated else 2
    router = 4.0 * 2 * shape.experts
    hidden = 2 * c * shape.hidden * shape.active_experts
    return c * tensors * routed + hidden + router, c * 3 * routed


def _adapters(shape: ModelShape, setup: Setup, size: Widths) -> Number:
    """What LoRA keeps: the input of each adapted matrix, and the low-rank product.

    Adapters are fp32 in peft, which casts the input of each to fp32; autocast casts that back, and then keeps only the
    half copy. Without any cast, matrices that read the same tensor share it, and the o projection's is kept anyway.
    """
    assert setup.lora_rank is not None
    modules = lora_modules(shape, setup.lora_targets)
    element = size.compute if size.autocast else 4.0
    copied = size.autocast or size.weight != size.trained
    inputs = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}
    kept = {inputs.get(name, name): width for name, width, _ in modules if name != "o_proj"}
    total = element * (sum(width for _, width, _ in modules) if copied else sum(kept.values()))
    total += element * setup.lora_rank * len(modules)
    if setup.method == "dora":
        total += size.compute * 2 * sum(outputs for _, _, outputs in modules)
    return total / setup.tensor_parallel


def logit_bytes(shape: ModelShape, setup: Setup) -> LogitBytes:
    """The vocabulary's chain. ``standard`` in transformers: logits, their fp32 copy (where they are half), the
    log-softmax, and in backward the gradients of both; the logits themselves live on where the caller holds the
    output (torch-loop) but not in Trainer, which drops it with ``compute_loss``.
    """
    size = widths(setup)
    vocab = shape.vocab / setup.tensor_parallel
    c = size.compute
    copy = 4.0 if c != 4 else 0.0
    # torch-loop holds the output by its procedure. On GPUs, published peaks of Trainer under autocast fit only if the
    # half logits behind accelerate's fp32 conversion live on; FSDP's runs, and steps traced on a CPU, show no such thing.
    converts = setup.framework == "hf-trainer" and size.autocast and setup.sharding != "fsdp"
    held = c if setup.framework == "torch-loop" or (converts and not is_cpu(setup.accelerator)) else 0.0
    head_gradients = 0.0
    if setup.loss == "standard":
        forward = c + copy + 4
        backward = held + 12.0
        kept = held + 4.0
    elif setup.loss == "chunked":  # torchtune: eight chunks, each cast and normalised by itself
        forward = c + 4 + (4 + 4) / 8
        backward = c + 4 + c + 8 / 8
        kept = c + 4.0
    elif setup.loss == "fused-kernel":  # one kernel over the logits' fp32 copy, whose gradient is cast back
        forward, backward, kept = c + copy, 2 * c + 4, 4.0
    elif setup.loss == "compiled":  # one pass reads the logits and writes their gradient
        forward, backward, kept = c, 2 * c, c
    else:  # fused-linear, cut-cross-entropy: the logits never exist at once; the head's gradient does
        forward = backward = kept = 0.0
        head_gradients = shape.vocab * shape.hidden * size.weight if setup.method == "full" else 0.0
    return LogitBytes(
        forward=forward * vocab,
        backward=backward * vocab,
        kept=kept * vocab,
        evaluation=(c + copy + 4.0) * vocab,
        head_gradients=head_gradients / setup.tensor_parallel,
    )


def head_input_bytes(shape: ModelShape, setup: Setup) -> Number:
    """Bytes per token that the last norm and the head keep."""
    size = widths(setup)
    trains = setup.method == "full"
    norm = (4.0 + (size.stream if trains else 0.0)) if shape.rms_norm else size.stream
    kept = size.compute if trains else 0.0
    return shape.hidden * (norm + kept) / setup.tensor_parallel
