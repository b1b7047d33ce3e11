"""Buffers of communication on a device: gathered parameters, gradients on their way, and the pools that keep them.

Read off torch's FSDP2 and reducer; DeepSpeed's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, maximum, minimum, where
from estimator.conventions import conventions
from estimator.setup import Setup
from estimator.shape import ModelShape
from estimator.states import QUANTIZED_BYTES, Placement, States, Widths, accumulates_in_fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """Of one setup; bytes."""

    shape: ModelShape
    setup: Setup
    size: Widths
    place: Placement
    states: States
    layers: Number
    """Of this pipeline stage."""

    @property
    def _layer_width(self) -> float:
        """Bytes of a layer's parameter as it is gathered: quantized ones stay packed."""
        return QUANTIZED_BYTES.get(self.setup.base_quantization or "", self.size.compute)

    def at(self, phase: str) -> Number:
        """Buffers of gradient reduction and parameter gathering; phases as memory.py's, and ``loss`` for the start of backward."""
        kind, ranks = self.setup.sharding, self.setup.data_ranks
        if kind == "ddp" and accumulates_in_fp32(self.setup):
            return 0.0  # Megatron reduces in the gradients' own buffer
        if kind == "ddp":  # torch's reducer: buckets beside the gradients
            return where(ranks > 1, self.states.trainable * self.size.trained, 0.0)
        if str(kind).startswith("zero") and phase != "optimizer":
            return self._deepspeed_buffers("forward" if phase == "forward" else "backward")
        if kind == "fsdp" and phase != "optimizer":
            return where(self.place.gathers, self._gathered(phase), 0.0)
        return 0.0

    def _gathered(self, phase: str) -> Number:
        """FSDP's buffers at the moments that can be the highest; its units are the tables, each layer, and the head."""
        width, head = self.size.compute, self.states.embedding
        whole = phase == "forward" and conventions(self.setup).loads_unsharded
        if whole or not self.setup.reshard_after_forward:
            return width * self.states.total
        if phase == "forward":  # the head, and what its all-gather put out
            return 2 * width * head
        if phase == "loss":
            return width * head
        # The layer itself and the one that is fetched ahead; trained, its gradients, and the unit's that is being reduced.
        layer = minimum(self.states.largest_layer, self.states.total)
        if self.setup.method in ("lora", "dora", "qlora"):
            return self._layer_width * 2 * layer + self.states.gradient_width * self.states.trainable / self.layers
        return (3 * width + 2 * self.states.gradient_width) * layer

    def pools(self) -> Number:
        """What communication keeps in the allocator's pools of its own streams."""
        if self.setup.sharding != "fsdp":
            return maximum(self.at("forward"), self.at("backward"))
        # All-gathers of the tables and of two layers, and the gradients of one.
        adapters = self.setup.method in ("lora", "dora", "qlora")
        tables = self.states.embedding * (1 if self.shape.tied_embeddings else 2)
        layer = minimum(self.states.largest_layer, self.states.total)
        pools = self.size.compute * ((1 if adapters else 2) * layer + tables)
        if not self.setup.reshard_after_forward:
            pools = self.size.compute * self.states.total
        reduced = self.states.trainable / self.layers if adapters else layer
        return where(self.place.gathers, pools + self.states.gradient_width * reduced, 0.0)

    def _deepspeed_buffers(self, phase: str) -> Number:
        """ZeRO-3 keeps up to stage3_max_live_parameters gathered, and its largest table; ZeRO-1 and 2 reduce through
        buckets of 5e8 elements (DeepSpeed's defaults; checked on published peaks of one card)."""
        table = self.states.embedding * self.size.compute
        if self.setup.sharding == "zero3":
            return self.size.compute * minimum(self.states.total, 1e9) + table
        if phase == "forward":
            return 0.0
        return self.size.compute * minimum(self.states.trainable, 5e8) + 2 * table
