"""Buffers of communication on a device: gathered parameters, gradients on their way, and the pools that keep them.

Read off torch's FSDP2 and reducer; DeepSpeed's are in ``estimator.memory.zero``, FSDP1's in ``estimator.memory.flat_parameters``.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, maximum, minimum, where
from estimator.conventions import conventions, shards_flat
from estimator.memory.flat_parameters import FlatUnits
from estimator.memory.states import QUANTIZED_BYTES, Placement, States, Widths, accumulates_in_fp32
from estimator.memory.zero import Engine
from estimator.model.shape import ModelShape
from estimator.setup import Setup


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
    def engine(self) -> Engine:
        """DeepSpeed's, where ZeRO shards."""
        return Engine(shape=self.shape, setup=self.setup, place=self.place, states=self.states)

    @property
    def flat(self) -> FlatUnits | None:
        """FSDP1's, where the setup has it."""
        if not shards_flat(self.setup):
            return None
        return FlatUnits(
            shape=self.shape,
            setup=self.setup,
            width=self.size.compute,
            layer_width=self._layer_width,
            states=self.states,
            layers=self.layers,
        )

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
        if str(kind).startswith("zero"):
            return self.engine.buffers(phase)
        if kind == "fsdp" and phase != "optimizer":
            return where(self.place.gathers, self._gathered(phase), 0.0)
        return 0.0

    @property
    def _layer(self) -> Number:
        """Parameters of a layer, which is gathered by itself."""
        return minimum(self.states.largest_layer, self.states.total)

    @property
    def reduce_width(self) -> float:
        """Bytes in which a gradient is reduced: accelerate takes the compute type, others fp32 where it is mixed."""
        mixed = self.setup.precision.endswith("-mixed")
        return self.size.compute if mixed and self.setup.framework == "hf-trainer" else self.states.gradient_width

    def _gathered(self, phase: str) -> Number:
        """FSDP's buffers at the moments that can be the highest; its units are the tables, each layer, and the head.

        A tied table is one unit with the head: gathered first, and never again.
        """
        width, head, layer, tied = self.size.compute, self.states.embedding, self._layer, self.shape.tied_embeddings
        adapters = self.setup.method in ("lora", "dora", "qlora")
        if self.flat is not None:
            return self.flat.gathered(phase)
        if not self.setup.reshard_after_forward:  # and the head's all-gather put out as much
            return width * (self.states.total + (head if phase == "forward" and not tied else 0.0))
        if phase == "forward":  # the head, and what the last all-gather put out
            return width * (head + (layer if tied else head))
        if phase == "loss":
            return width * head
        stays = width * head if tied else 0.0
        if adapters:
            return (
                stays + self._layer_width * 2 * layer + self.states.gradient_width * self.states.trainable / self.layers
            )
        # The layer itself, the one that is fetched ahead, the unit's gradients that are being reduced, and of its own those of
        # the down projection, which come first.
        reduced = maximum(layer, head) if phase == "head" and not tied else layer
        return stays + 2 * width * layer + self.reduce_width * reduced + self.first_gradient

    @property
    def first_gradient(self) -> Number:
        """Of a layer's matrices the down projection has its gradient first."""
        if self.shape.experts:
            return 0.0
        return self.size.compute * self.shape.hidden * self.shape.ffn / self.setup.tensor_parallel

    def gathering(self) -> Number:
        """The most that a forward pass gathers: a table in its all-gather's output and copied out of it, beside the last layer's
        output; the first two layers' where the table is tied, which is gathered first."""
        if self.setup.sharding != "fsdp" or self.flat is not None or not self.setup.reshard_after_forward:
            return 0.0
        layers = (2 if self.shape.tied_embeddings else 1) * self._layer
        return where(self.place.gathers, self.size.compute * (2 * self.states.embedding + layers), 0.0)

    def gathering_layer(self) -> Number:
        """The same of a layer: its all-gather's output, that copied out of it, and the output before, which the next one's frees;
        and a tied table."""
        if self.setup.sharding != "fsdp" or self.flat is not None or not self.setup.reshard_after_forward:
            return 0.0
        stays = self.size.compute * self.states.embedding if self.shape.tied_embeddings else 0.0
        return where(self.place.gathers, 3 * self._layer_width * self._layer + stays, 0.0)

    def finished_layer(self) -> Number:
        """Gradients of a layer as its backward ends, before they are copied to be reduced; ``at("backward")`` is beside them."""
        if self.setup.sharding != "fsdp" or self.flat is not None or self.setup.method != "full":
            return 0.0
        return where(self.place.gathers, self.size.compute * self._layer, 0.0)

    def reducing_head(self) -> Number:
        """As the head's gradients are reduced: its gradient (three of them and the head itself while a chunked loss adds its
        pieces up), the reduction's input, and the next layer that is fetched."""
        if self.setup.sharding != "fsdp" or self.setup.method != "full" or self.flat is not None:
            return 0.0
        head, width = self.states.embedding, self.size.compute
        reduced: Number = 0.0
        gathered = self._layer if self.setup.reshard_after_forward else self.states.total
        if not self.shape.tied_embeddings:
            reduced = width * (head + gathered) + self.reduce_width * head * (1 + 1 / self.place.gradients)
        if self.setup.loss == "chunked":
            reduced = maximum(reduced, width * (3 * head + maximum(gathered, head)))
        return where(self.place.gathers, reduced, 0.0)

    def reducing_table(self) -> Number:
        """The same of the embedding, last of all, less its reduced gradient, which is not there yet. A tied one stands beside its
        two gradients, and their sum where they aren't added in place."""
        if self.setup.sharding != "fsdp" or self.setup.method != "full":
            return 0.0
        table, width = self.states.embedding, self.size.compute
        previous = self.reduce_width * self._layer
        if self.flat is not None:
            reduced = self.flat.splitting()
        elif self.shape.tied_embeddings:
            in_place = self.setup.loss in ("chunked", "fused-linear", "cut-cross-entropy")
            # DTensor's gradients of head and lookup are split in different ways: each is copied before they are added.
            copies = (3 if in_place else 4) + where(self.setup.tensor_parallel > 1, 2, 0)
            reduced = copies * width * table + previous
        else:
            reduced = maximum(2 * width * table + previous, (width + self.reduce_width) * table)
        missing = self.states.gradient_width * table / self.place.gradients
        return where(self.place.gathers, maximum(reduced - missing, 0.0), 0.0)

    def across_replicas(self) -> Number:
        """Hybrid sharding keeps, to the end of backward, what it summed over the replicas, where gradients are of another type."""
        if self.setup.sharding != "fsdp" or self.reduce_width == self.states.gradient_width:
            return 0.0
        replicated = self.setup.data_ranks * self.setup.context_parallel > self.place.gradients
        return where(replicated, self.reduce_width * self.states.trainable / self.place.gradients, 0.0)

    def unsharded_gradients(self) -> Number:
        """What is not reduced before the last micro-batch: until then the whole model's gradients are on every rank."""
        if self.setup.sharding != "fsdp" or not conventions(self.setup).reduces_last:
            return 0.0
        whole = self.reduce_width * (self.states.trainable if self.flat is None else self.flat.with_gradients())
        return where(self.place.gathers, where(self.setup.accumulation > 1, whole, 0.0), 0.0)

    def adding_table(self) -> Number:
        """Beside gradients that are not reduced: the table, and a tied one's two further gradients; or FSDP1's root."""
        if self.flat is not None:
            return where(self.unsharded_gradients() > 0, self.flat.splitting(), 0.0)
        summed = self.shape.tied_embeddings and self.setup.method == "full"
        table = self.size.compute * self.states.embedding * (3 if summed else 1)
        return where(self.unsharded_gradients() > 0, table, 0.0)

    def output(self) -> Number:
        """What the forward pass's last all-gather put out."""
        last = self._layer if self.shape.tied_embeddings else self.states.embedding
        return where(self.place.gathers, self.size.compute * last, 0.0)

    def outputs(self) -> Number:
        """The pool of the all-gathers' stream: a table and the layer beside it."""
        return where(self.place.gathers, self.size.compute * (self.states.embedding + self._layer), 0.0)

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
