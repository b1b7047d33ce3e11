"""Moments that only FSDP and ZeRO-3 have: what it gathers and reduces around the tables (``estimator.memory.communication`` has the buffers)."""

from __future__ import annotations

from estimator.arrays import Number, maximum, minimum, where
from estimator.conventions import stream_ranks
from estimator.memory.ledger import Ledger, Moment
from estimator.memory.states import keeps_master_weights

_LOSS_CHUNKS = 8
"""torchtune's, as in ``estimator.memory.losses``."""


def moments(ledger: Ledger) -> list[Moment]:
    if ledger.setup.sharding == "zero3":
        return [
            full_bucket(ledger, first=True),
            full_bucket(ledger, first=False),
            fetching_head(ledger),
            ledger.moment(
                "forward", gradients=ledger.held_gradients, communication=ledger.buffers.engine.fetching_ahead()
            ),
        ]
    if ledger.setup.sharding == "zero2":
        return [first_bucket(ledger)] if keeps_master_weights(ledger.setup) and not ledger.setup.offload else []
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


def fetching_head(ledger: Ledger) -> Moment:
    """ZeRO-3 gathers the head, before there are logits."""
    return ledger.moment(
        "forward",
        gradients=ledger.held_gradients,
        activations=ledger.held.kept,
        communication=ledger.buffers.engine.fetching_head(),
    )


def first_bucket(ledger: Ledger) -> Moment:
    """ZeRO-2 fills its first bucket after the last layers of backward."""
    left, partition, own = ledger.buffers.engine.first_bucket()
    held, full = ledger.held, ledger.setup.method == "full"
    fills = where(left > 0, 1.0, 0.0)
    waiting = ledger.size.stream * ledger.states.embedding if full and ledger.shape.tied_embeddings else 0.0
    return ledger.moment(
        "backward",
        gradients=ledger.held_gradients + partition,
        activations=held.kept * left + fills * (held.recomputed + held.transient),
        logits=ledger.tokens * ledger.logits.held,
        temporaries=fills * waiting + own,
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
    gradients, flat = ledger.buffers.finished_layer(), ledger.buffers.flat is not None
    frozen = ledger.setup.method == "freeze"
    layers = minimum(ledger.layers, ledger.setup.trainable_layers or 0) if frozen else ledger.layers
    share = maximum(1 - 2 / layers, 0.0)
    tables = 0.0 if frozen else ledger.buffers.unmade_tables()
    made = maximum(ledger.states.gradients - ledger.held_gradients - tables, 0.0) * share
    left = ledger.buffers.left_unsharded(units=2) if last else ledger.states.gradients
    held = where(ledger.buffers.unsharded_gradients() > 0, left, ledger.held_gradients)
    norms = 4 * ledger.tokens * ledger.size.stream * ledger.shape.hidden / stream_ranks(ledger.setup)
    # A tied table's first gradient waits for the lookup's, and FSDP1's head for its unit's.
    waits = not frozen and (ledger.shape.tied_embeddings or flat)
    waiting = ledger.size.stream * ledger.states.embedding if waits else 0.0
    before = where(gradients > 0, ledger.held.kept * (share if last else 1 / layers) + norms, 0.0)
    return ledger.moment(
        "backward",
        gradients=held + (0.0 if last else where(gradients > 0, made, 0.0)),
        activations=before,
        logits=ledger.tokens * ledger.logits.held,
        temporaries=where(gradients > 0, gradients - ledger.buffers.first_gradient + waiting, 0.0),
        # FSDP1's has what is fetched ahead; layers that were not freed after the forward pass are by the end of backward.
        communication=ledger.buffers.at(
            "head" if flat and (last or ledger.setup.reshard_after_forward) else "backward"
        ),
    )


def first_layers(ledger: Ledger) -> Number:
    """Bytes less than with all gradients and the usual buffers, under FSDP: at the first trained layer its own gradients are not
    there; in full the tables' neither, and where a layer is fetched ahead it is the embedding, if any; at the second the first's are
    missing too."""
    setup, states, buffers = ledger.setup, ledger.states, ledger.buffers
    if setup.sharding != "fsdp" or setup.method not in ("full", "freeze"):
        return 0.0
    gradients = states.gradient_width * buffers.layer / ledger.place.gradients
    if setup.method == "freeze":
        return where(ledger.place.gathers, minimum(gradients, states.gradients - ledger.held_gradients), 0.0)
    gathered = ledger.size.compute * buffers.layer
    if buffers.flat is not None:  # fetches nothing ahead at its first
        first, second = 0.0, gathered if buffers.flat.fetches_ahead else 0.0
    else:
        embedding = 0.0 if ledger.shape.tied_embeddings else ledger.size.compute * states.embedding
        first, second = embedding - gathered, 0.0 if setup.reshard_after_forward else embedding
    least = maximum(first, second - gradients + ledger.held.kept / ledger.layers)
    missing = gradients + buffers.unmade_tables() - least
    most = ledger.states.gradients - ledger.held_gradients
    return where(ledger.place.gathers, where(most > 0, missing, 0.0), 0.0)


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
