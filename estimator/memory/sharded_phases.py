"""Moments that only FSDP and ZeRO-3 have: what it gathers and reduces around the tables (``estimator.memory.communication`` has the buffers)."""

from __future__ import annotations

from estimator.arrays import maximum, where
from estimator.conventions import stream_ranks
from estimator.memory.ledger import Ledger, Moment

_LOSS_CHUNKS = 8
"""torchtune's, as in ``estimator.memory.losses``."""


def moments(ledger: Ledger) -> list[Moment]:
    if ledger.setup.sharding == "zero3":
        return [full_bucket(ledger, first=True), full_bucket(ledger, first=False)]
    return [
        gathering(ledger),
        last_layer(ledger),
        reducing(ledger),
        finished_layer(ledger, last=True),
        finished_layer(ledger, last=False),
        accumulated(ledger),
    ]


def full_bucket(ledger: Ledger, *, first: bool) -> Moment:
    """ZeRO-3 copies what it reduces in the middle of backward, at a layer's."""
    left, buffers = ledger.buffers.engine.full_bucket(first=first)
    held, tied = ledger.held, ledger.shape.tied_embeddings
    reduces = where(left > 0, 1.0, 0.0) if ledger.setup.method == "full" else 0.0
    return ledger.moment(
        "backward",
        gradients=ledger.held_gradients,
        activations=reduces * (held.kept * left + held.recomputed + held.transient),
        logits=ledger.tokens * ledger.logits.held,
        temporaries=reduces * (ledger.size.stream * ledger.states.embedding if tied else 0.0),
        communication=where(reduces > 0, buffers, 0.0),
    )


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


def finished_layer(ledger: Ledger, *, last: bool) -> Moment:
    """The last layer but one (or the first but one, when all others' gradients are there) has its gradients, and of its
    activations only what comes before its attention is left."""
    gradients = ledger.buffers.finished_layer()
    share = maximum(1 - 2 / ledger.layers, 0.0)
    made = maximum(ledger.states.gradients - ledger.held_gradients, 0.0) * share
    norms = 4 * ledger.tokens * ledger.size.stream * ledger.shape.hidden / stream_ranks(ledger.setup)
    # A tied table's first gradient waits for the lookup's.
    waiting = ledger.size.stream * ledger.states.embedding if ledger.shape.tied_embeddings else 0.0
    before = where(gradients > 0, ledger.held.kept * (share if last else 1 / ledger.layers) + norms, 0.0)
    return ledger.moment(
        "backward",
        gradients=ledger.held_gradients + (0.0 if last else where(gradients > 0, made, 0.0)),
        activations=before,
        logits=ledger.tokens * ledger.logits.held,
        temporaries=where(gradients > 0, gradients - ledger.buffers.first_gradient + waiting, 0.0),
        communication=ledger.buffers.at("backward"),
    )


def reducing(ledger: Ledger) -> Moment:
    """FSDP reduces the head's gradients, when only what the caller holds is left of the logits."""
    outputs = ledger.tokens * ledger.logits.held
    if ledger.setup.loss == "chunked":  # the chunks to come, when the first two have been added
        logits = ledger.tokens * ledger.size.compute * ledger.shape.vocab / stream_ranks(ledger.setup)
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
