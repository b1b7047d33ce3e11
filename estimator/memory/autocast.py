"""Half-precision casts that autocast makes of wider weights, and how long they live; bytes."""

from __future__ import annotations

from estimator.arrays import Number
from estimator.memory.flat_parameters import ADAPTERS
from estimator.memory.ledger import Ledger
from estimator.model.layer_facts import layer_facts

LOSS_CHUNKS = 8
"""torchtune's, as in ``estimator.memory.losses``."""


def autocast_copies(ledger: Ledger, phase: str) -> Number:
    """At the end of the ``forward`` pass, as ``backward`` begins, or in the backward of the ``layers``.

    Without checkpointing the graph keeps them until backward has passed; with it, autocast's cache keeps them to the end of
    the forward pass, and then only the head's stays.
    """
    size, setup, states = ledger.size, ledger.setup, ledger.states
    if not size.autocast:
        return 0.0
    if not size.casts_weights:  # only the adapters are wider than the compute type
        return size.compute * states.trainable if size.trained == 4 else 0.0
    head = _head_casts(ledger, phase) * states.embedding
    # Autocast does not reach grouped experts; gathered matrices are cast layer by layer.
    layers = (states.linear - states.experts) / ledger.place.parameters
    if setup.base_quantization:
        layers = 0.0
    if setup.method == "freeze":  # no graph before the first trained layer
        layers = layers * ((setup.trainable_layers or 0) / ledger.shape.layers)
    adapters = states.trainable if setup.method in ADAPTERS and size.trained == 4 else 0.0
    # Autocast caches the casts of trained weights only; frozen ones live where the graph keeps them, which offloading takes along.
    if setup.checkpointing == "none" and setup.offload != "activations":
        return size.compute * (layers + adapters + head)
    if phase != "forward" or setup.compile or layer_facts(ledger.shape.family).transposed:
        return size.compute * head
    return size.compute * (head + (layers if setup.method in ("full", "freeze") else adapters))


def evaluation_copies(ledger: Ledger) -> Number:
    """Of an evaluation, which has no graph: those of trained weights, in autocast's cache."""
    size, setup, states = ledger.size, ledger.setup, ledger.states
    if not size.casts_weights:
        return autocast_copies(ledger, "backward")
    if setup.compile or layer_facts(ledger.shape.family).transposed:
        return 0.0
    if setup.method in ADAPTERS:
        return size.compute * states.trainable if size.trained == 4 else 0.0
    layers = (states.linear - states.experts) / ledger.place.parameters
    if setup.method == "freeze":
        return size.compute * layers * (setup.trainable_layers or 0) / ledger.shape.layers
    return size.compute * (layers + states.embedding)


def _head_casts(ledger: Ledger, phase: str) -> int:
    """Casts of the head that are alive."""
    setup = ledger.setup
    if phase == "layers" or (setup.loss in ("fused-linear", "cut-cross-entropy") and phase != "forward"):
        return 0  # backward is through with it, or the loss was with its own products
    if setup.loss == "chunked" and setup.method != "full":
        return LOSS_CHUNKS  # every chunk casts a frozen head anew
    if setup.loss == "fused-linear" and setup.method == "full":
        return 2  # the kernel's own cast beside the cached one
    return 1
