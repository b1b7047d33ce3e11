"""FSDP1: buffers of its units, each one flat parameter; bytes per device.

Read off torch's ``distributed/fsdp`` (``_runtime_utils.py``, ``_flat_param.py``), 2.1 to 2.13. Its root unit holds what belongs
to no layer, the tables and the last norm, and stays gathered from the start of the forward pass to the end of backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number
from estimator.conventions import conventions, shards_flat
from estimator.memory.states import States
from estimator.model.shape import ModelShape
from estimator.setup import Setup

ADAPTERS = ("lora", "dora", "qlora")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatUnits:
    """Of one setup that several ranks shard."""

    shape: ModelShape
    setup: Setup
    width: float
    """Bytes of a gathered element."""
    layer: Number
    """Bytes of a gathered layer, which may be quantized."""
    states: States
    layers: Number

    @property
    def root(self) -> Number:
        """Gathered tables."""
        return self.width * self.states.embedding * (1 if self.shape.tied_embeddings else 2)

    @property
    def fetches_ahead(self) -> bool:
        return not (self.setup.checkpointing == "full" and self.setup.checkpoint_reentrant)

    def gathered(self, phase: str) -> Number:
        """Phases as ``Buffers.at``'s: with the root stand, in backward, a layer and (but for the last one) the layer that is
        fetched ahead, from the loss's on, and adapters' gradients. A reentrant checkpoint's output needed no gradient as the
        layer ran: such layers are not fetched ahead."""
        if not self.setup.reshard_after_forward and phase != "backward":
            return self.root + self.layer * self.layers
        ahead = 1 if self.fetches_ahead else 0
        if phase in ("forward", "loss"):
            return self.root + (ahead * self.layer if phase == "loss" else 0.0)
        gradients: Number = 0.0
        if self.setup.method in ADAPTERS:
            gradients = self.width * self.with_gradients() / self.layers
            if not conventions(self.setup).mixed_units:
                gradients = self.states.gradient_width * self.states.trainable / self.layers
        return self.root + (1 + ahead if phase == "head" else 1) * self.layer + gradients

    def with_gradients(self) -> Number:
        """Elements that have gradients."""
        if self.setup.method in ADAPTERS and conventions(self.setup).mixed_units:
            return self.states.total - self.root / self.width
        return self.states.trainable

    def splitting(self) -> Number:
        """The end of backward, trained in full: autograd puts the tables' gradients together into the root's."""
        return 3 * self.root if self.setup.method == "full" else self.root


def keeps_layer_inputs(setup: Setup) -> bool:
    """Whether every layer's input and its gradient stay to the end of backward: FSDP1 waits for the gradients of a frozen
    unit's inputs with hooks that refer to the nodes they hang on, and so keep them alive, up to where backward ends. Under
    reentrant checkpointing these are nodes of detached inputs, which hold the tensor and its gradient."""
    frozen = setup.method in ADAPTERS and not conventions(setup).mixed_units
    return shards_flat(setup) and frozen and setup.checkpointing == "full" and setup.checkpoint_reentrant
