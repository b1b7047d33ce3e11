"""DeepSpeed's engine in bytes per device: buckets, gathered parameters, and what its step takes.

Read off DeepSpeed 0.14 (``runtime/zero``) with its defaults; ``estimator.dryrun.deepspeed`` executes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, ceil, maximum, minimum, where
from estimator.memory.states import Placement, States
from estimator.model.shape import ModelShape, count_parameters
from estimator.setup import Setup

# Elements: reduce_bucket_size; sub_group_size; stage3_max_live_parameters and stage3_max_reuse_distance.
_BUCKET, _SUB_GROUP, _MAX_LIVE = 5e8, 1e9, 1e9
_AHEAD = 5e7
"""stage3_prefetch_bucket_size: gathered into one flat buffer, and copied out of it."""
_HALF, _FULL, _DOUBLE = 2, 4, 8
# What expandable segments grow to over the tensors in them, and in stage 3 beside its streams (published reserved peaks).
_GROWN, _GROWN_STREAMS = 1.05, 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Of one setup whose sharding is ZeRO."""

    shape: ModelShape
    setup: Setup
    place: Placement
    states: States

    @property
    def _partition(self) -> Number:
        """This rank's trained parameters."""
        return self.states.trainable / self.place.optimizer

    def buffers(self, phase: str) -> Number:
        """Communication buffers in ``forward``, at the ``loss``, in ``backward`` (``head``: at its start, ``table``: when all
        gradients are added) and in ``optimizer``.

        Stage 3 has its bucket from the start and copies what is in it when it is full; the others make theirs in backward.
        Offloading, they also keep the largest gradient, where one at a time is added up on its way to the host.
        """
        bucket = _HALF * _BUCKET
        if self.setup.sharding == "zero3":
            copied = where(self.states.trainable > _BUCKET, bucket, 0.0) if phase == "backward" else 0.0
            return bucket + copied + self._gathered(phase)
        staged = _HALF * self.largest() if self.setup.offload else 0.0
        return staged + (bucket if phase in ("loss", "head", "backward", "table") else 0.0)

    def largest(self) -> Number:
        """Elements of the largest trained tensor."""
        if self.setup.method in ("lora", "dora", "qlora"):
            return (self.setup.lora_rank or 1) * max(self.shape.plain_ffn, self.shape.hidden)
        matrix = self.shape.plain_ffn * self.shape.hidden
        return maximum(self.states.embedding if self.setup.method == "full" else 0.0, matrix)

    @property
    def _matrix(self) -> Number:
        """Elements of a layer's largest tensor: in such steps parameters are gathered, and gradients put into the bucket."""
        shape = self.shape
        if shape.moe_layers:  # the experts' first products are one
            return shape.experts * (shape.matrices - 1) * shape.ffn * shape.hidden
        return shape.plain_ffn * shape.hidden

    @property
    def _layered(self) -> Number:
        """Elements of all layers, and of a head that is its own."""
        return maximum(self.states.total - self.states.embedding, 0.0)

    def _gathered(self, phase: str) -> Number:
        """Several ranks gather module by module and keep what comes again within a distance, here of 1e9 elements: as backward
        begins the last layers, as it ends the first and the table."""
        if phase == "optimizer":
            return 0.0
        live: Number = _MAX_LIVE + self._matrix / 2
        if phase in ("backward", "table"):
            # The first layer's last modules have less to go than the distance, however large it is.
            live = self._live(minimum(self.states.largest_layer, _MAX_LIVE) if phase == "backward" else 0.0)
        else:  # a head is whole whatever the limit
            live = maximum(live, self.states.embedding)
        live = minimum(live, self.states.total + (_AHEAD if phase in ("forward", "loss") else 0.0))
        if self.setup.method == "freeze":  # frozen layers have no backward: what they gathered does not come again
            trained = (self.setup.trainable_layers or 0) * self.states.largest_layer
            live = minimum(live, self.states.embedding + trained)
        if phase in ("head", "backward"):
            live = maximum(live, 2 * self._experts)
        return where(self.place.gathers, _HALF * live, 0.0)

    def fetching_head(self) -> Number:
        """Buffers as the head is gathered, ahead of its turn with the last norm: in a flat buffer, and copied out of it."""
        head = 0.0 if self.shape.tied_embeddings else 2 * self.states.embedding
        return _HALF * _BUCKET + where(self.place.gathers, _HALF * head, 0.0)

    def fetching_ahead(self) -> Number:
        """Buffers amid frozen layers, of which as many are gathered ahead as the limit lets live."""
        frozen = self.setup.method == "freeze"
        coming = self.states.total if self.shape.tied_embeddings else self._layered
        live = minimum(_MAX_LIVE + self._matrix / 2, coming + _AHEAD)
        return where(self.place.gathers, _HALF * (_BUCKET + live), 0.0) if frozen else 0.0

    @property
    def _experts(self) -> Number:
        """Elements of a layer's experts, two tensors of one module: gathered into a flat buffer and copied out of it."""
        shape = self.shape
        return shape.experts * shape.matrices * shape.ffn * shape.hidden if shape.moe_layers else 0.0

    def _live(self, left: Number) -> Number:
        """Gathered elements when backward has ``left`` of the layers to go: when it comes near the table, this is fetched too."""
        return where(left > _MAX_LIVE, _MAX_LIVE + self._matrix / 2, left + self.states.embedding)

    def full_bucket(self, *, first: bool) -> tuple[Number, Number]:
        """Stage 3 copies a full bucket: (the share of the layers that backward has left then, all buffers), at the ``first`` of
        these moments or at that with the most gathered."""
        filled = _BUCKET - self._matrix / 2
        times = 1 if first else maximum(ceil((self._layered - _MAX_LIVE) / filled), 1)
        left = maximum(self._layered - times * filled, 0.0)
        live = minimum(self._live(left), self.states.total)
        buffers = _HALF * (_BUCKET + filled) + where(self.place.gathers, _HALF * live, 0.0)
        return left / maximum(self._layered, 1.0), buffers

    def held_gradients(self) -> Number:
        """While a forward pass runs: stage 3's buffer is never freed, the others' hold earlier micro-batches'."""
        if self.setup.sharding == "zero3":
            return self.states.gradients
        return where(self.setup.accumulation > 1, self.states.gradients, 0.0)

    def arriving(self) -> Number:
        """Beside ``states.gradients`` at the end of backward (stage 1: after it): the partition that is being filled."""
        if self.setup.offload or self.setup.sharding == "zero3":
            return 0.0
        if self.setup.sharding == "zero1":
            return _HALF * maximum(self._partition - self._filled, 0.0)
        return where(self.setup.accumulation > 1, _HALF * self._partition, 0.0)

    @property
    def _filled(self) -> Number:
        """Elements in the bucket when it is reduced for the first time: their own gradients are gone."""
        full = max(_BUCKET - self._matrix / 2, 0.0)
        return where(self.states.trainable > _BUCKET, full, self.states.trainable)

    def first_bucket(self) -> tuple[Number, Number, Number]:
        """Stage 2 reduces its first full bucket, with which the partition of its gradients comes into being: (the share of the
        layers that backward has left then, bytes of that partition, of gradients that no bucket holds); 0 where none fills."""
        states, tables = self.states, 0.0 if self.setup.method != "full" else self.states.embedding
        head = 0.0 if self.shape.tied_embeddings else tables
        layered = maximum(states.trainable - tables - head, 1.0)
        left = minimum(1 - (self._filled - head) / layered, 1.0)
        fills = where(states.trainable > _BUCKET, where(left > 0, 1.0, 0.0), 0.0)
        own = _HALF * self._matrix if self._matrix > _BUCKET else 0.0
        return fills * left, fills * _HALF * self._partition, fills * own

    def step_gradients(self) -> Number:
        """The partition that the optimizer reads."""
        return 0.0 if self.setup.offload else _HALF * self._partition

    def step_temporaries(self) -> Number:
        """What a step takes beside its gradients. The optimizer is DeepSpeed's fused AdamW, which needs nothing."""
        if self.setup.offload:
            return 0.0
        return maximum(self._flattened(), self._examined())

    def _flattened(self) -> Number:
        """A sub-group at a time is flattened and cast to fp32; before, each tensor's norm is taken in fp64."""
        matrices = self._partition
        if self.setup.method == "full":  # norms and biases, which have no weight decay, are a group of their own
            matrices = matrices - count_parameters(self.shape).norm / self.place.optimizer
        group = (_HALF + _FULL) * minimum(matrices, _SUB_GROUP)
        return maximum(group, _DOUBLE * self.largest() / self.place.optimizer)

    def _examined(self) -> Number:
        """Stage 3 first looks for infinite gradients, in the stream of its reductions."""
        return (_HALF + 1) * self._partition if self.setup.sharding == "zero3" else 0.0

    def segments(self, persistent: Number, tensors: Number, fragments: Number, *, expandable: bool) -> Number:
        """The allocator's segments: ``persistent`` bytes, the highest ``tensors`` with what ``fragments`` keep beside them.

        Stage 3's step finds its flat buffers no room in what backward left, and its reductions have a pool of their own. What
        one rank loads before it is flattened stays as well (published reserved peaks of one card).
        """
        buffers = maximum(self.buffers("loss"), self.buffers("optimizer"))
        if self.setup.offload:  # nothing but the same buffers comes between two forward passes
            return persistent + buffers + _GROWN * tensors
        later = self.states.gradients - self.held_gradients() + self.arriving()
        if self.setup.sharding != "zero3":
            grown = _GROWN * tensors if expandable else tensors + fragments
            return persistent + buffers + maximum(grown, later + self._flattened())
        step = self._flattened() + _HALF * self._partition
        pool = maximum(self._examined(), _HALF * minimum(self.states.trainable, _BUCKET))
        grown = maximum(_GROWN_STREAMS * tensors, step) if expandable else tensors + maximum(step, fragments)
        return persistent + buffers + pool + grown
