"""Trainer under DeepSpeed: the model's real steps, and the engine's flat buffers by rule. Loads torch on import.

From DeepSpeed 0.14 (``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``config.py``) with its defaults: buckets of 5e8 elements,
sub-groups of 1e9, overlapping communication in stage 3 only. Weights are half without autocast; the optimizer is the
engine's own fused Adam over one rank's fp32 partition, or with ``offload`` the host's.
"""

from __future__ import annotations

from typing import Any

import torch

from estimator.building.model import decoder_layers
from estimator.dryrun.deepspeed_gather import Gatherer
from estimator.dryrun.events import Storage
from estimator.dryrun.steps import Loop
from estimator.dryrun.tracker import Tracker
from estimator.model.catalog import resolve_model, rotary_positions
from estimator.setup import Setup

BUCKET = 500_000_000
"""Elements: ``reduce_bucket_size``."""
_SUB_GROUP = 1_000_000_000
_HALF, _FULL, _DOUBLE = 2, 4, 8


class DeepSpeedLoop(Loop):
    """``setup`` resolved, its precision that of the half weights."""

    def __init__(self, setup: Setup, model: Any, tracker: Tracker, *, cuda: bool) -> None:
        super().__init__(setup, model, tracker, cuda=cuda)
        self._stage = int(str(setup.sharding)[-1])
        self._ranks = setup.data_ranks
        self._offloads = setup.offload is not None
        layer_of = {id(p): index for index, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
        # transformers gives matrices weight decay, and norms and biases none: the engine has a flat buffer for each.
        kinds = [p for p in self._trained if p.dim() > 1], [p for p in self._trained if p.dim() <= 1]
        self._groups = [_Flat(group, layer_of) for kind in kinds for group in _sub_groups(kind, self._ranks)]
        self._all = _Flat(self._trained, layer_of)
        self._bucket: list[torch.Tensor] = []
        self._states_live = False
        self._micro_batches = 0
        self._buffers: dict[str, int] = {}
        # Stage 3 overlaps its reductions with the backward pass: they have a stream of their own.
        self._reducing = 1 if self._stage == 3 else 0
        self._gatherer = Gatherer(model, tracker, self._ranks) if self._stage == 3 and self._ranks > 1 else None

    # --- buffers that stay ----------------------------------------------------------------------------------------

    def _load(self) -> None:
        for index, layer in enumerate(decoder_layers(self._model)):
            for parameter in layer.parameters():
                self._tracker.homes[parameter.untyped_storage()._cdata] = index
        shared = 1 if self._stage < 3 else self._ranks
        frozen = [p for p in self._model.parameters() if not p.requires_grad]
        if frozen:
            self._take("parameters", _Flat(frozen, self._all.layer_of), _HALF / shared)
        self._rotary_tables()
        for group in self._groups:
            self._take("parameters", group, _HALF / shared)
        for group in self._groups:
            if self._offloads:
                continue
            clone = self._take("temporaries", group, _HALF / self._ranks)
            self._take("optimizer", group, _FULL / self._ranks)
            self._give(clone)
        if self._stage == 3:
            if not self._offloads:
                self._give(self._take("temporaries", max(self._groups, key=lambda g: g.elements), _FULL / self._ranks))
            self._take_bytes("communication", BUCKET * _HALF)
            if not self._offloads:
                self._take("gradients", self._all, _HALF / self._ranks)
        elif self._offloads:  # where one gradient at a time is added up on its way to the host
            self._take("communication", _Flat([max(self._trained, key=lambda p: p.numel())], {}), _HALF)
        if self._stage > 1:
            for parameter in self._trained:
                parameter.register_post_accumulate_grad_hook(self._collect)

    def _rotary_tables(self) -> None:
        """Before transformers 4.43 every layer kept the cosines and sines of all positions."""
        if self._setup.logit_copies != "shifted":
            return
        shape = resolve_model(self._setup.model)
        positions = rotary_positions(shape.name)
        if positions is not None:
            layer = 2 * positions * shape.head_dim * _HALF
            layers = len(decoder_layers(self._model))
            self._take_bytes("parameters", layer * layers, dict.fromkeys(range(layers), layer))

    # --- backward -------------------------------------------------------------------------------------------------

    def _trainer_micro_batch(self, ids: torch.Tensor) -> None:
        self._micro_batches += 1
        super()._trainer_micro_batch(ids)

    @property
    def _last(self) -> bool:
        """The micro-batch is the last of its step."""
        return self._micro_batches % self._setup.accumulation == 0

    def _backward(self, loss: torch.Tensor) -> None:
        if self._stage < 3:
            self._buffers["bucket"] = self._take_bytes("communication", BUCKET * _HALF)
        super()._backward(loss)
        if self._stage == 1:
            # Reduced when all micro-batches have passed; until then gradients are the parameters' own.
            if not self._last:
                self._give(self._buffers.pop("bucket"))
                return
            for parameter in self._trained:
                self._collect(parameter)
        self._reduce()
        if self._stage < 3:
            self._give(self._buffers.pop("bucket"))
            if "partition" in self._buffers and "arriving" in self._buffers:
                self._give(self._buffers.pop("arriving"))  # added to what earlier micro-batches left
            elif "arriving" in self._buffers:
                self._buffers["partition"] = self._buffers.pop("arriving")

    def _collect(self, parameter: torch.Tensor) -> None:
        """A gradient goes into the bucket and its own memory is free; one that the bucket can't hold stays as it is."""
        held = sum(p.numel() for p in self._bucket)
        if self._bucket and held + parameter.numel() > BUCKET:
            self._reduce()
        self._bucket.append(parameter)
        if parameter.numel() <= BUCKET:
            parameter.grad = None

    def _reduce(self) -> None:
        """What is in the bucket is reduced; this rank's part goes into its partition of the gradients."""
        if not self._bucket:
            return
        if self._stage == 3:
            if len(self._bucket) > 1:
                flat = _Flat(self._bucket, self._all.layer_of)
                self._give(self._take("communication", flat, _HALF, self._reducing))
        elif not self._offloads and "arriving" not in self._buffers:
            self._buffers["arriving"] = self._take("gradients", self._all, _HALF / self._ranks)
        if self._offloads:
            largest = _Flat([max(self._bucket, key=lambda p: p.numel())], {})
            self._give(self._take("temporaries", largest, _FULL / self._ranks))
        for parameter in self._bucket:
            parameter.grad = None
        self._bucket.clear()

    def _name_gradients(self) -> None:
        if self._stage == 1:  # in the others they are in the engine's buffers
            super()._name_gradients()

    # --- the step -------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        if self._gatherer is not None:
            self._gatherer.release_all()
        if self._offloads:
            return
        # Whether any gradient is infinite, and their norm, one parameter after the other.
        if self._stage == 3:
            magnitude = self._take("temporaries", self._all, _HALF / self._ranks, self._reducing)
            infinite = self._take("temporaries", self._all, 1 / self._ranks, self._reducing)
            self._give(infinite)
            self._give(magnitude)
        for parameter in self._trained:
            self._give(self._take("temporaries", _Flat([parameter], {}), _DOUBLE / self._ranks))
        for group in self._groups:
            flat = self._take("gradients", group, _HALF / self._ranks)
            wide = self._take("gradients", group, _FULL / self._ranks)
            self._give(flat)
            if not self._states_live:
                self._take("optimizer", group, _FULL / self._ranks)
                self._take("optimizer", group, _FULL / self._ranks)
            self._give(wide)
        self._states_live = True
        if "partition" in self._buffers:
            self._give(self._buffers.pop("partition"))

    # --- the stream -----------------------------------------------------------------------------------------------

    def _take(self, category: str, flat: _Flat, width: float, stream: int = 0) -> int:
        """``width`` bytes for each element, of which further layers bring more."""
        layers = {layer: round(elements * width) for layer, elements in flat.of_layers.items()}
        return self._take_bytes(category, round(flat.elements * width), layers, stream)

    def _take_bytes(self, category: str, amount: int, layers: dict[int, int] | None = None, stream: int = 0) -> int:
        storage = Storage(
            bytes=amount, category=category, layer=None, holder="DeepSpeed", bytes_of_layers=layers or {}, stream=stream
        )
        return self._tracker.stream.birth(storage, None)

    def _give(self, index: int) -> None:
        self._tracker.stream.death(index, None)


class _Flat:
    """Parameters in one buffer: how many elements, and how many of them each layer has."""

    def __init__(self, parameters: list[torch.Tensor], layer_of: dict[int, int]) -> None:
        self.layer_of = layer_of
        self.elements = sum(parameter.numel() for parameter in parameters)
        self.of_layers: dict[int, int] = {}
        for parameter in parameters:
            layer = layer_of.get(id(parameter))
            if layer is not None:
                self.of_layers[layer] = self.of_layers.get(layer, 0) + parameter.numel()


def _sub_groups(parameters: list[Any], ranks: int) -> list[list[Any]]:
    """Parameters whose partitions together are a sub-group, which steps by itself."""
    groups: list[list[Any]] = []
    held = _SUB_GROUP
    for parameter in parameters:
        if held >= _SUB_GROUP:
            groups.append([])
            held = 0
        groups[-1].append(parameter)
        held += -(-parameter.numel() // ranks)
    return groups
