"""The vocabulary's chain: what logits, loss and their gradients hold, in bytes per token, by loss and framework.

Read off transformers' loss, torchtune's, Liger's and Apple's code. Notation as in activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, where
from estimator.conventions import conventions, stream_ranks
from estimator.memory.states import Widths, widths
from estimator.model.layer_facts import layer_facts
from estimator.model.shape import ModelShape
from estimator.setup import Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitBytes:
    """Bytes per token over the vocabulary and around it."""

    forward: Number
    """At the end of the loss."""
    backward: Number
    """At the softmax's backward."""
    held: Number
    """By the caller, while the layers' backward runs."""
    evaluation: Number
    """Without gradients."""
    returned: Number
    """What Trainer's conversion of the model's outputs to fp32 adds at the end of the forward pass."""
    converted: Number
    """The half logits with their fp32 copy; 0 where there is none."""
    head_gradients: Number
    """Bytes (not per token) of head gradients that a fused-linear loss holds from the forward pass on."""


def logit_bytes(shape: ModelShape, setup: Setup) -> LogitBytes:
    """The vocabulary's chain. ``standard`` in transformers: logits, their fp32 copy (where they are half), the
    log-softmax, and in backward the gradients of both; the logits themselves live on where the caller holds the
    output (torch-loop) but not in Trainer, which drops it with ``compute_loss``.
    """
    size = widths(setup)
    vocab = shape.vocab / stream_ranks(setup)
    c = size.compute
    convention = conventions(setup)
    copy = 4.0 if c != 4 and convention.upcasts_logits else 0.0
    converts = setup.framework == "hf-trainer" and size.autocast and setup.logit_copies == "none"
    whole = compiles_loss(setup)
    held: Number = c if convention.holds_logits and setup.loss != "chunked" else 0.0
    # Split logits are normalised in single operators, with exp beside what was shifted; their gradient's sum with exp is one more.
    summed = where(setup.tensor_parallel > 1, 4.0, 0.0) if convention.parallel_loss else 0.0
    forward, backward = _loss_chain(setup, c=c, copy=copy, held=held + summed)
    made = bool(forward)  # before it is an array, as in a plan's grids
    forward = forward + (summed if setup.loss == "standard" else 0.0)
    if shape.family in _OWN_LOSS and setup.logit_copies != "none" and setup.loss in ("standard", "fused-kernel"):
        forward, backward = _own_loss(setup, size)
    if layer_facts(shape.family).logit_cap and made:  # tanh keeps its result
        forward, backward = forward + c, backward + c
    linear = setup.loss in ("fused-linear", "cut-cross-entropy")
    head_gradients = shape.vocab * shape.hidden * size.stream if linear and setup.method == "full" else 0.0
    return LogitBytes(
        forward=forward * vocab,
        backward=backward * vocab,
        held=held * vocab if made else 0.0,
        returned=4.0 * vocab if converts and (setup.loss in ("fused-kernel", "compiled") or whole) else 0.0,
        # torchtune's loss works chunk by chunk there too; the others leave an evaluation to the model's own.
        evaluation=(c + (copy + 4.0) / (8 if setup.loss == "chunked" and not convention.separate_losses else 1))
        * vocab,
        converted=(c + copy if copy else 0.0) * vocab,
        head_gradients=head_gradients / setup.tensor_parallel,
    )


_OWN_LOSS = ("gpt_bigcode",)
"""Families whose modelling code had a loss of its own before transformers 4.50, which does not upcast."""


def _own_loss(setup: Setup, size: Widths) -> tuple[float, float]:
    """As ``_loss_chain``: the half logits are shifted and normalised in their type, or in fp32 under autocast, whose caller
    then holds what the model returned in both types."""
    c = size.compute
    normal = 4.0 if size.autocast else c
    held = c + (4.0 if size.autocast else 0.0)
    if setup.loss == "fused-kernel":
        return 2 * c + normal, held + 2 * c + normal
    return 2 * c + (2 if size.autocast else 1) * normal, held + 3 * normal


def _loss_chain(setup: Setup, *, c: float, copy: float, held: Number) -> tuple[Number, Number]:
    """Bytes a logit (at the end of the loss, in its backward): ``c`` of the logits, ``copy`` of their fp32 copy, ``held``
    by the caller."""
    convention = conventions(setup)
    if convention.loss_in_place:
        return c, c
    copies = setup.logit_copies != "none"
    shifted = where(setup.batch > 1, 4.0, 0.0) if copies else 0.0  # a single sequence without its end needs no copy
    half = c if setup.logit_copies == "shifted-and-half" else 0.0
    if compiles_loss(setup):  # as below, and autograd has zeros for the gradient of the logits, which the model returns
        return c, 3 * c
    if setup.loss == "standard" and convention.softmax_in_place:
        return c + copy, copy + c
    if setup.loss == "standard":
        return (half + copy + shifted if copies else c + copy) + 4, held + 12.0
    if setup.loss == "chunked":
        if convention.separate_losses:  # as many fp32 log-softmaxes, then gradients, as logits
            return 8.0, 8.0
        if setup.compile:  # one kernel a chunk, whose logits go when their gradient is there
            return c, c + (c / 8 if convention.frees_chunks else c)
        # torchtune: eight chunks, upcast and normalised one by one; the logits are dropped before backward.
        return c + 4 + copy / 8, 4 + (4 + copy) / 8
    if setup.loss == "fused-kernel":  # in place on the fp32 copy, whose gradient is cast back
        if copies and copy:
            return half + copy + shifted, 4 + c
        return c + copy, held + copy + c if copy else c
    if setup.loss == "compiled":  # one pass reads the logits and writes their gradient
        return c, 2 * c
    return 0.0, 0.0  # fused-linear, cut-cross-entropy: the logits never exist at once


def compiles_loss(setup: Setup) -> bool:
    """Whether the loss is a part of the compiled model, as transformers' is."""
    with_model = setup.framework.startswith("hf-trainer") or setup.framework == "torch-loop"
    return setup.compile and with_model and setup.loss in ("standard", "compiled")


def head_input_bytes(shape: ModelShape, setup: Setup) -> Number:
    """Bytes per token that the last norm and the head keep."""
    size = widths(setup)
    trains = setup.method == "full"
    norm = (4.0 + (size.stream if trains else 0.0)) if shape.rms_norm else size.stream
    kept = size.compute if trains else 0.0
    return shape.hidden * (norm + kept) / stream_ranks(setup)
