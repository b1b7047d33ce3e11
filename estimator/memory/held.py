"""What the layers hold of one micro-batch on a device: through the forward pass, recomputed, and for a moment; bytes."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, maximum, minimum, where
from estimator.conventions import stream_ranks
from estimator.memory.activations import builds_mask, layer_activations
from estimator.memory.adapters import dora_temporaries
from estimator.memory.blocks import mean_rest
from estimator.memory.flat_parameters import keeps_layer_inputs
from estimator.memory.states import ADAPTER_START, Placement, Widths
from estimator.model.lora_targets import adapted_experts
from estimator.model.shape import ModelShape
from estimator.setup import Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Bytes over the micro-batches in flight on a device."""

    kept: Number
    """From the forward pass to backward."""
    recomputed: Number
    """One layer's, where checkpointing or offloading brings it back."""
    transient: Number
    """The most that a layer's backward has for a moment beyond what the layer keeps."""
    returned: Number
    """What FSDP1 keeps at the end of backward of the inputs that layers were recomputed from, and of their gradients."""
    first_layer: Number
    """What the first layer keeps once its backward begins."""
    in_feed_forward: Number
    """``transient`` of its feed-forward alone."""
    in_attention: Number
    """And of its attention, when its feed-forward's tensors are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Bytes of one layer over a micro-batch."""

    kept: Number
    inputs: Number
    """What full checkpointing keeps instead."""
    selective: Number
    products: Number
    """What eager attention's softmax and its backward have at once."""
    shared: Number
    """Of ``kept``, the residual stream itself, which the first norm reads."""
    unreached: Number
    """Of ``kept``, what neither checkpointing nor offloading reaches."""
    in_feed_forward: Number
    in_attention: Number

    @property
    def transient(self) -> Number:
        return maximum(self.in_feed_forward, self.in_attention)


def _brought_back(shape: ModelShape, setup: Setup, size: Widths, tokens: Number) -> Number:
    """Offloaded tensors come back one operation at a time. The gate's product reads two as wide as the feed-forward;
    ``transient`` is beyond what a layer keeps, of which that product's own output is gone by then."""
    return tokens * size.compute * 3 * shape.plain_ffn / setup.tensor_parallel


def held(
    shape: ModelShape,
    setup: Setup,
    size: Widths,
    place: Placement,
    *,
    tokens: Number,
    layers: Number,
    in_flight: Number,
) -> Held:
    """tokens: of a micro-batch on this device; layers: on this device; in_flight: micro-batches held at once."""
    kinds = [
        (_layer(shape, setup, size, tokens, moe=moe), count * layers / shape.layers)
        for moe, count in ((False, shape.plain_layers), (True, shape.moe_layers))
        if count
    ]
    kept: Number = sum(layer.kept * share for layer, share in kinds)
    inputs: Number = sum(layer.inputs * share for layer, share in kinds)
    selective: Number = sum(layer.selective * share for layer, share in kinds)
    largest, transient = kinds[0][0].kept, kinds[0][0].transient
    for layer, _ in kinds[1:]:
        largest, transient = maximum(largest, layer.kept), maximum(transient, layer.transient)
    kept = _without_gradients(shape, setup, kept, tokens)
    recomputed: Number = 0.0
    returned: Number = 0.0
    if setup.offload == "activations":  # only what the next layers need is on the device, and what selective ones cache
        cached: Number = sum(layer.unreached * share for layer, share in kinds)
        if setup.checkpointing == "selective":
            cached = selective - inputs + cached
        kept, recomputed, in_flight = cached, maximum(largest, kept / layers) - cached / layers, 1
        if setup.checkpointing == "none" and shape.matrices == 3 and not shape.experts:
            back = _brought_back(shape, setup, size, tokens)
            recomputed = minimum(recomputed, maximum(back, kinds[0][0].products - transient))
    elif setup.checkpointing == "full":
        recomputed = largest - kinds[0][0].shared
        if keeps_layer_inputs(setup):
            returned = where(place.gathers, 2 * inputs, 0.0)
        kept = inputs
    elif setup.checkpointing == "selective":
        kept = minimum(kept, selective) if setup.method not in ("dora", "freeze") else selective
        recomputed = maximum(largest - kept / layers, 0.0)
    first = kinds[0][0]
    return Held(
        kept=kept * in_flight,
        recomputed=recomputed,
        transient=transient,
        returned=returned,
        first_layer=recomputed
        if setup.offload == "activations" and setup.checkpointing == "none"
        else first.kept + _below(setup, first, layers),
        in_feed_forward=first.in_feed_forward,
        in_attention=first.in_attention,
    )


def _below(setup: Setup, first: _Layer, layers: Number) -> Number:
    """What the checkpoints of the first trained layer and of those below it keep: backward passes through frozen ones too, since
    transformers has the embeddings require gradients."""
    frozen = layers - (setup.trainable_layers or 0) if setup.method == "freeze" else 0
    if setup.checkpointing == "full":
        return (1 + frozen) * first.inputs - first.shared
    return frozen * first.selective if setup.checkpointing == "selective" else 0.0


def _without_gradients(shape: ModelShape, setup: Setup, kept: Number, tokens: Number) -> Number:
    """``kept`` less what comes before the first tensor that needs a gradient."""
    if setup.method == "freeze" and setup.trainable_layers:
        return kept * min(1.0, setup.trainable_layers / shape.layers)
    if setup.method == "adapter":  # nothing before the first prompt needs a gradient
        return kept * (1 - ADAPTER_START / shape.layers)
    if setup.method in ("lora", "dora", "qlora") and shape.rms_norm:  # the first norm comes before the first adapter
        return kept - tokens * 4 * shape.hidden / stream_ranks(setup)
    return kept


def _layer(shape: ModelShape, setup: Setup, size: Widths, tokens: Number, *, moe: bool) -> _Layer:
    layer = layer_activations(shape, setup, moe=moe)
    context = setup.seq
    kept = tokens * (layer.kept + layer.scores * context)
    products, first = layer.transient_scores * context, layer.selective_scores
    products_wide = layer.transient_scores
    if builds_mask(setup):
        # The mask is of one sequence; more sequences in the batch go without, but never below that.
        masked = layer_activations(shape, setup, moe=moe, masked=True)
        one = tokens / setup.batch * (masked.kept + masked.scores * context)
        unmasked, unmasked_products = kept, products
        kept = maximum(kept, one * (setup.batch if setup.attention_kernel else 1))
        kept = where(setup.batch > 1, kept, one)
        if not setup.pack:  # every sequence has a mask
            kept, products = one * setup.batch, 0.0
        elif setup.attention_kernel is None:
            products = where(setup.batch > 1, products, 0.0)
        whole = setup.context_parallel == 1  # else the mask would be of a part
        kept, products = where(whole, kept, unmasked), where(whole, products, unmasked_products)
        one_mask = (setup.batch == 1) & whole
        first = where(one_mask, masked.selective_scores, first)
    softmax = where(products > 0, layer.softmax_transient + products, 0.0)
    attention = maximum(maximum(layer.attention_transient, softmax), layer.norm_transient) - layer.mlp
    matrix: Number = 0.0
    if setup.base_quantization:  # one at a time in the compute type
        matrix = size.compute * shape.hidden * (shape.ffn if moe else shape.plain_ffn) / setup.tensor_parallel
    norms = dora_temporaries(shape, setup)
    merged: Number = 0.0  # experts with their adapters added, the down projection's gradient beside them
    if moe and adapted_experts(shape, setup):
        merged = size.weight * shape.experts * shape.hidden * shape.ffn / setup.tensor_parallel
    unreached = 0.0 if setup.checkpoint_reentrant and setup.checkpointing == "full" else layer.quantized_inputs
    selective = layer.selective + first * context + unreached
    rests = _rests(shape, setup, size, tokens, layer.kept - layer.mlp, 0.0 if moe else layer.mlp)
    return _Layer(
        kept=kept + shape.matrices * merged + rests,
        inputs=tokens * (layer.layer_input + unreached),
        selective=tokens * selective + layer.selective_fixed,
        products=tokens * (layer.scores + products_wide) * context,
        shared=tokens * layer.shared,
        unreached=tokens * unreached,
        in_feed_forward=maximum(tokens * layer.transient, norms) + matrix + merged,
        in_attention=(maximum(tokens * attention, norms) if norms else tokens * attention) + matrix,
    )


def _rests(shape: ModelShape, setup: Setup, size: Widths, tokens: Number, narrow: Number, wide: Number) -> Number:
    """What the blocks of a layer's tensors hold beyond these. narrow, wide: bytes per token in tensors of the stream's width and
    of the feed-forward's."""
    rests: Number = 0.0
    for total, width in ((narrow, shape.hidden), (wide, shape.plain_ffn)):
        tensor = size.compute * width / setup.tensor_parallel
        rests = rests + total / tensor * mean_rest(setup, tokens * tensor, width)
    return rests
