"""What a feed-forward keeps for backward, and its backward takes for a moment, in bytes per token of one layer.

Notation as in activations.py. A gated one keeps gate, its activation, up, and their product; a plain one the input of the
activation and its output. The last of these is kept by the down projection, where that trains.
"""

from __future__ import annotations

from estimator.arrays import Number
from estimator.conventions import conventions
from estimator.memory.adapters import BITSANDBYTES
from estimator.memory.widths import Widths, input_width
from estimator.model.layer_facts import layer_facts
from estimator.model.lora_targets import adapted_experts
from estimator.model.shape import ModelShape
from estimator.setup import Setup


def feed_forward_bytes(shape: ModelShape, setup: Setup, size: Widths, *, moe: bool) -> tuple[Number, Number]:
    """(kept, the most that backward has for a moment beyond what is kept)."""
    if moe:
        return _experts(shape, setup, size)
    width = shape.plain_ffn / setup.tensor_parallel
    kept, transient = _ordinary(shape, setup, size)
    return kept * width, transient * width


def _ordinary(shape: ModelShape, setup: Setup, size: Widths) -> tuple[Number, Number]:
    """Bytes of an element of the width, (kept, transient)."""
    c, convention = size.compute, conventions(setup)
    if setup.base_quantization in BITSANDBYTES and size.casts_weights:
        c = size.stream  # their products return their input's type
    reads = setup.method in ("full", "freeze") or convention.keeps_frozen_inputs
    last = 1 if reads else 0
    if shape.gated:
        if setup.compile:  # what lies between the products is recomputed in backward's kernels
            return (2 + last) * c, (3 - last) * c
        if convention.fused_layers:  # one kernel from the first products to the last one's input
            return 2 * c + last * input_width(setup, size), 3 * c
        return (3 + last) * c, (3 - last) * c
    if setup.compile:
        return c, 2 * c
    if not convention.written_out_gelu:
        return c + last * input_width(setup, size), 3 * c
    return _plain(layer_facts(shape.family).activation, c, last, autocast=size.autocast)


def _plain(activation: str, c: float, last: int, *, autocast: bool) -> tuple[Number, Number]:
    if activation == "relu":  # keeps its output, which the down projection reads
        return c, 2 * c
    if activation == "gelu-written":
        # x, x/2, tanh and 1 + tanh; under autocast the power and what follows are fp32, the output's cast is not.
        wide = 4.0 if autocast else c
        return 3 * wide + c + c * last, 3 * wide - c * last
    return (1 + last) * c, (2 - last) * c


def _experts(shape: ModelShape, setup: Setup, size: Widths) -> tuple[Number, Number]:
    """Every token is in ``active`` experts and the shared ones; the routed copies of the hidden state are kept too, where the
    experts train as their input, and in any case before they are weighted."""
    # Autocast does not reach the products of grouped experts; experts that an adapter is added to have gradients.
    c = size.stream if size.casts_weights else size.compute
    reads = setup.method in ("full", "freeze") or adapted_experts(shape, setup)
    routed = shape.active_experts * shape.ffn / setup.tensor_parallel
    tensors: float = (4 if reads else 3) if shape.gated else (2 if reads else 1)
    if layer_facts(shape.family).activation == "clamped":
        tensors += 3  # both halves clamped, sigmoid, gate times sigmoid, up plus one
    router = 4.0 * 2 * shape.experts
    copies: float = 2 if reads else 1
    if conventions(setup).fused_layers and setup.method == "full":
        # One kernel between the products weighs their outputs as well: what leaves an expert is kept by nothing.
        tensors, copies = shape.matrices - 1 + input_width(setup, size) / c, input_width(setup, size) / c
    hidden = copies * c * shape.routed_hidden * shape.active_experts
    beside = shape.shared_experts * shape.ffn / setup.tensor_parallel
    kept, transient = _ordinary(shape, setup, size)
    momentary = c * 3 * routed
    if setup.logit_copies != "none":  # transformers of that age loop over the experts; tokens spread evenly
        momentary = momentary / shape.experts
    return c * tensors * routed + hidden + router + kept * beside, momentary + transient * beside
