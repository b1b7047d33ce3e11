"""Moments that only FSDP has: what it gathers and reduces around the tables (``estimator.memory.communication`` has the buffers)."""

from __future__ import annotations

from estimator.arrays import maximum, where
from estimator.memory.ledger import Ledger, Moment

_LOSS_CHUNKS = 8
"""torchtune's, as in ``estimator.memory.losses``."""


def moments(ledger: Ledger) -> list[Moment]:
    return [gathering(ledger), last_layer(ledger), reducing(ledger), finished_layer(ledger), accumulated(ledger)]


def gathering(ledger: Ledger) -> Moment:
    """FSDP gathers the head, before there are logits; a tied one before everything else."""
    return ledger.moment(
        "forward",
        gradients=ledger.held_gradients,
        activations=0.0 if ledger.shape.tied_embeddings else ledger.held.kept,
        communication=ledger.buffers.gathering(),
    )


def last_layer(ledger: Ledger) -> Moment:
    """FSDP gathers the last layer, when all others have left what they keep."""
    return ledger.moment(
        "forward",
        gradients=ledger.held_gradients,
        activations=ledger.held.kept * (1 - 1 / ledger.layers),
        communication=ledger.buffers.gathering_layer(),
    )


def finished_layer(ledger: Ledger) -> Moment:
    """The last layer but one has its gradients, and of its activations only what comes before its attention is left."""
    gradients = ledger.buffers.finished_layer()
    norms = 4 * ledger.tokens * ledger.size.stream * ledger.shape.hidden / ledger.setup.tensor_parallel
    # A tied table's first gradient waits for the lookup's.
    waiting = ledger.size.stream * ledger.states.embedding if ledger.shape.tied_embeddings else 0.0
    before = where(gradients > 0, ledger.held.kept * maximum(1 - 2 / ledger.layers, 0.0) + norms, 0.0)
    return ledger.moment(
        "backward",
        gradients=ledger.held_gradients,
        activations=before,
        logits=ledger.tokens * ledger.logits.held,
        temporaries=where(gradients > 0, gradients - ledger.buffers.first_gradient + waiting, 0.0),
        communication=ledger.buffers.at("backward"),
    )


def reducing(ledger: Ledger) -> Moment:
    """FSDP reduces the head's gradients, when only what the caller holds is left of the logits."""
    outputs = ledger.tokens * ledger.logits.held
    if ledger.setup.loss == "chunked":  # the chunks to come, when the first two have been added
        logits = ledger.tokens * ledger.size.compute * ledger.shape.vocab / ledger.setup.tensor_parallel
        outputs = logits * (1 - 2 / _LOSS_CHUNKS)
    return ledger.moment(
        "backward",
        gradients=ledger.held_gradients,
        activations=ledger.held.kept,
        logits=outputs,
        communication=ledger.buffers.reducing_head(),
    )


def accumulated(ledger: Ledger) -> Moment:
    """A micro-batch ends whose gradients are not reduced."""
    return ledger.moment(
        "backward", gradients=ledger.held_gradients, communication=ledger.buffers.adding_table()
    )  # fmt: skip
