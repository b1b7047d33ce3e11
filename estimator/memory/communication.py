"""Buffers of communication on a device: gathered parameters, gradients on their way, and the pools that keep them.

Read off torch's FSDP2 and reducer; DeepSpeed's are in ``estimator.memory.zero``, FSDP1's in ``estimator.memory.flat_parameters``.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, either, maximum, minimum, where
from estimator.conventions import conventions, shards_flat
from estimator.memory.flat_parameters import ADAPTERS, FlatUnits
from estimator.memory.states import QUANTIZED_BYTES, STATISTICS_BYTES, Placement, States, Widths, accumulates_in_fp32
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
            width=self._width,
            layer=self._layer_bytes,
            states=self.states,
            layers=self.layers,
        )

    @property
    def _width(self) -> float:
        """Bytes of an element as it is gathered: beside a quantized base nothing is cast."""
        return self.size.weight if self.setup.base_quantization else self.size.compute

    @property
    def _adapters(self) -> Number:
        """Bytes of a layer's adapters as they are gathered."""
        if self.setup.method not in ADAPTERS:
            return 0.0
        mixed = self.setup.precision.endswith("-mixed") and not self.setup.base_quantization
        return (self.size.compute if mixed else self.size.trained) * self._trained / self.layers

    @property
    def _layer_bytes(self) -> Number:
        """Of a layer as it is gathered: quantized matrices stay packed, and their statistics are no parameters."""
        kind = self.setup.base_quantization
        if kind is None:
            return self.size.compute * self.layer + self._adapters
        packed = self.states.quantized / self.layers
        width = QUANTIZED_BYTES[kind] - STATISTICS_BYTES[kind]
        return width * packed + self._width * maximum(self.layer - packed, 0.0) + self._adapters

    @property
    def _tables(self) -> Number:
        """Bytes of embedding and head."""
        return self._width * self.states.embedding * (1 if self.shape.tied_embeddings else 2)

    @property
    def _whole(self) -> Number:
        """Bytes of all that is gathered, where nothing is freed in between."""
        return self._layer_bytes * self.layers + self._tables

    def at(self, phase: str) -> Number:
        """Buffers of gradient reduction and parameter gathering; phases as in ``Engine.buffers``."""
        kind, ranks = self.setup.sharding, self.setup.data_ranks
        if kind in ("ddp", "zero1") and accumulates_in_fp32(self.setup):
            return 0.0  # Megatron reduces in the gradients' own buffer
        if kind == "ddp":  # torch's reducer: buckets beside the gradients
            return where(ranks > 1, self.states.trainable * self.size.trained, 0.0)
        if str(kind).startswith("zero"):
            return self.engine.buffers(phase)
        if kind == "fsdp" and phase != "optimizer":
            return where(self.place.gathers, self._gathered("backward" if phase == "table" else phase), 0.0)
        return 0.0

    @property
    def layer(self) -> Number:
        """Elements of a layer, which is gathered by itself."""
        padding = self.states.padding / maximum(self.shape.moe_layers, 1) * (self.shape.layers / self.layers)
        return minimum(self.states.largest_layer, self.states.total) + padding

    @property
    def _trained(self) -> Number:
        """Elements that are trained, as they are gathered and reduced."""
        return self.states.trainable + self.states.trained_padding

    @property
    def reduce_width(self) -> float:
        """Bytes in which a gradient is reduced: accelerate takes the compute type, others fp32 where it is mixed."""
        mixed = self.setup.precision.endswith("-mixed")
        return self.size.compute if mixed and self.setup.framework == "hf-trainer" else self.states.gradient_width

    def _gathered(self, phase: str) -> Number:
        """FSDP's buffers at the moments that can be the highest; its units are the tables, each layer, and the head.

        A tied table is one unit with the head: gathered first, and never again.
        """
        width, head, tied = self._width, self.states.embedding, self.shape.tied_embeddings
        adapters = self.setup.method in ADAPTERS
        if self.flat is not None:
            own = self.setup.method not in ADAPTERS and phase in ("backward", "head")
            return self.flat.gathered(phase) + (self.first_gradient if own else 0.0)
        if not self.setup.reshard_after_forward and phase != "backward":  # and the head's all-gather put out as much
            return self._whole + (width * head if phase == "forward" and not tied else 0.0)
        if phase == "forward":  # the head, and what the last all-gather put out
            return width * head + (self._layer_bytes if tied else width * head)
        if phase == "loss":
            return width * head
        stays = width * head if tied else 0.0
        if adapters:
            return stays + 2 * self._layer_bytes + self.states.gradient_width * self._trained / self.layers
        # The layer itself, the one that is fetched ahead, the unit's gradients that are being reduced, and of its own those of
        # the down projection, which come first.
        reduced = maximum(self.layer, head) if phase == "head" and not tied else self.layer
        if phase == "head" and self.setup.method == "freeze":
            reduced = 0.0  # the head is frozen, and no layer has come before the last
        return stays + 2 * self._layer_bytes + self.reduce_width * reduced + self.first_gradient

    @property
    def first_gradient(self) -> Number:
        """Of a layer's matrices the down projection has its gradient first."""
        if self.shape.experts:
            return 0.0
        return self.size.compute * self.shape.hidden * self.shape.ffn / self.setup.tensor_parallel

    def unmade_tables(self) -> Number:
        """Gradients of tables that a layer's backward does not find: all but those of an FSDP2 unit with an untied head."""
        alone = self.flat is None and not self.shape.tied_embeddings
        tables = 1 if alone or self.shape.tied_embeddings else 2
        return self.states.gradient_width * tables * self.states.embedding / self.place.gradients

    def before_attention(self) -> Number:
        """Of a layer's gradients, beyond ``first_gradient``, the feed-forward's others: they are there when backward comes to
        attention. A compiled layer's come all at once."""
        trains = self.setup.method in ("full", "freeze")
        if self.setup.sharding != "fsdp" or not trains or self.setup.compile:
            return 0.0
        others = (self.shape.matrices - 1) * self.first_gradient
        if self.shape.experts:
            others = self.size.compute * self.states.experts * (self.shape.layers / self.shape.moe_layers) / self.layers
        return where(self.place.gathers, others, 0.0)

    def gathering(self) -> Number:
        """The most that a forward pass gathers: a table in its all-gather's output and copied out of it, beside the last layer's
        output; the first two layers' where the table is tied, which is gathered first."""
        if self.setup.sharding != "fsdp" or self.flat is not None or not self.setup.reshard_after_forward:
            return 0.0
        layers = (2 if self.shape.tied_embeddings else 1) * self._layer_bytes
        return where(self.place.gathers, 2 * self._width * self.states.embedding + layers, 0.0)

    def gathering_layer(self) -> Number:
        """The same of a layer: its all-gather's output, that copied out of it, and the output before, which the next one's frees;
        and a tied table."""
        if self.setup.sharding != "fsdp" or self.flat is not None or not self.setup.reshard_after_forward:
            return 0.0
        stays = self._width * self.states.embedding if self.shape.tied_embeddings else 0.0
        return where(self.place.gathers, 3 * self._layer_bytes + stays, 0.0)

    def finished_layer(self) -> Number:
        """Gradients of a layer as its backward ends, before they are copied to be reduced; FSDP1 puts them together before it frees
        the layer."""
        if self.setup.sharding != "fsdp" or self.setup.method not in ("full", "freeze"):
            return 0.0
        layer = minimum(self.states.largest_layer, self.states.total) * (1 if self.flat is None else 2)
        return where(self.place.gathers, self.size.compute * layer, 0.0)

    def reducing_head(self) -> Number:
        """As the head's gradients are reduced: its gradient (three of them and the head itself while a chunked loss adds its
        pieces up), the reduction's input, and the next layer that is fetched."""
        if self.setup.sharding != "fsdp" or self.setup.method != "full":
            return 0.0
        if self.flat is not None:
            added = self.flat.gathered("loss") + 3 * self.size.compute * self.states.embedding
            return where(self.place.gathers, added if self.setup.loss == "chunked" else 0.0, 0.0)
        head, width = self.states.embedding, self.size.compute
        reduced: Number = 0.0
        # The head itself is freed before its reduction, but not while a chunked loss still multiplies with it.
        whole = self.states.total + self.states.padding
        gathered = self.layer if self.setup.reshard_after_forward else whole
        if not self.shape.tied_embeddings:
            left = self.layer if self.setup.reshard_after_forward else whole - head
            reduced = width * (head + left) + self.reduce_width * head * (1 + 1 / self.place.gradients)
        if self.setup.loss == "chunked":
            reduced = maximum(reduced, width * (3 * head + maximum(gathered, head)))
        return where(self.place.gathers, reduced, 0.0)

    def reducing_table(self) -> Number:
        """The same of the embedding, last of all, less its reduced gradient, which is not there yet. A tied one stands beside its
        two gradients, and their sum where they aren't added in place."""
        if self.setup.sharding != "fsdp" or self.setup.method != "full":
            return 0.0
        table, width = self.states.embedding, self.size.compute
        previous = self.reduce_width * self.layer
        if self.flat is not None and not self.shape.tied_embeddings:
            reduced = self.flat.splitting()
        elif self.shape.tied_embeddings:
            in_place = self.setup.loss in ("chunked", "fused-linear", "cut-cross-entropy")
            copies = (3 if in_place else 4) + self.differently_split()
            reduced = copies * width * table + previous
        else:
            reduced = (2 + self.differently_split()) * width * table + previous
            reduced = maximum(reduced, (width + self.reduce_width) * table)
        missing = self.states.gradient_width * table / self.place.gradients
        return where(self.place.gathers, maximum(reduced - missing, 0.0), 0.0)

    def differently_split(self) -> Number:
        """The copies of a split table that DTensor has in a gradient of the lookup, which every rank makes whole: over tokens, not words."""
        tensor = self.setup.tensor_parallel
        return where(tensor > 1, tensor, 0)

    def across_replicas(self) -> Number:
        """Hybrid sharding keeps, to the end of backward, what it summed over the replicas, where that is no gradient itself: those
        are of another type, or it is added to one."""
        if self.setup.sharding != "fsdp":
            return 0.0
        added = self.setup.accumulation > (self.setup.accumulation if conventions(self.setup).reduces_last else 1)
        cast = self.reduce_width != self.states.gradient_width
        apart = either(either(cast, added), self.setup.zero_grad == "zero")
        replicated = where(apart, self.setup.data_ranks * self.setup.context_parallel > self.place.gradients, False)
        return where(replicated, self.reduce_width * self._trained / self.place.gradients, 0.0)

    def unsharded_gradients(self) -> Number:
        """What is not reduced before the last micro-batch: until then the whole model's gradients are on every rank."""
        if self.setup.sharding != "fsdp" or not conventions(self.setup).reduces_last:
            return 0.0
        whole = self.reduce_width * (self.states.trainable if self.flat is None else self.flat.with_gradients())
        return where(self.place.gathers, where(self.setup.accumulation > 1, whole, 0.0), 0.0)

    def left_unsharded(self, *, units: int) -> Number:
        """Of ``unsharded_gradients``, when as many units of the last micro-batch are reduced: the larger of head and last layer, or
        both. FSDP1's root is reduced last of all."""
        head = 0.0 if self.shape.tied_embeddings else self.states.embedding
        layer = minimum(self.states.largest_layer, self.states.total)
        gone = 0.0 if self.flat is not None else maximum(layer, head) if units == 1 else layer + head
        return maximum(self.unsharded_gradients() - self.reduce_width * gone, 0.0)

    def adding_table(self) -> Number:
        """Beside gradients that are not reduced: the table, and a tied one's two further gradients; or FSDP1's root."""
        if self.flat is not None:
            return where(self.unsharded_gradients() > 0, self.flat.splitting(), 0.0)
        summed = self.shape.tied_embeddings and self.setup.method == "full"
        table = self.size.compute * self.states.embedding * (3 if summed else 1)
        return where(self.unsharded_gradients() > 0, table, 0.0)

    def output(self) -> Number:
        """What the forward pass's last all-gather put out."""
        last = self._layer_bytes if self.shape.tied_embeddings else self._width * self.states.embedding
        return where(self.place.gathers, last, 0.0)

    def outputs(self) -> Number:
        """The pool of the all-gathers' stream: a table and the layer beside it."""
        return where(self.place.gathers, self._width * self.states.embedding + self._layer_bytes, 0.0)

    def pools(self) -> Number:
        """What communication keeps in the allocator's pools of its own streams."""
        if self.setup.sharding != "fsdp":
            return maximum(self.at("forward"), self.at("backward"))
        # All-gathers of the tables and of two layers, and the gradients of one.
        adapters = self.setup.method in ADAPTERS
        pools = (1 if adapters else 2) * self._layer_bytes + self._tables
        if not self.setup.reshard_after_forward:
            pools = self._whole
        reduced = self._trained / self.layers if adapters else self.layer
        return where(self.place.gathers, pools + self.states.gradient_width * reduced, 0.0)
