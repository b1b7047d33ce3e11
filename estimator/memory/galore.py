"""GaLore's AdamW as Trainer runs it: moments of a low-rank projection of each matrix's gradient.

Sources: galore-torch 1.0 (``adamw.py``, ``galore_projector.py``) and transformers 5 (``trainer_optimizer.py``), with their
defaults: rank 128, projections renewed every 200 steps. Projected are the linear layers inside the decoder layers, the targets
that transformers' documentation names; embeddings, head, norms and experts (whose matrices are one tensor) are not.
"""

from __future__ import annotations

from estimator.model.shape import ModelShape, count_parameters, lora_modules

RANK = 128


def _matrices(shape: ModelShape) -> list[tuple[int, int, int]]:
    """(shorter side, longer side, how many) of the projected matrices."""
    found = []
    for name, inputs, outputs in lora_modules(shape, "all-linear"):
        feeds = name in ("gate_proj", "up_proj", "down_proj")
        found.append((min(inputs, outputs), max(inputs, outputs), shape.plain_layers if feeds else shape.layers))
    return found


def state_bytes(shape: ModelShape, width: float) -> float:
    """Two moments of each matrix [rank, longer side] and its projection [rank, shorter side], two moments of everything else,
    as wide as the parameters (width: bytes of an element). A fp32 projection is a view that keeps all singular vectors alive,
    [shorter side, shorter side]."""
    elements = 2.0 * count_parameters(shape).total
    for short, long, count in _matrices(shape):
        rank = min(RANK, short)
        elements += count * (2 * rank * long + (short if width == 4 else rank) * short - 2 * short * long)
    return elements * width


def step_bytes(shape: ModelShape, width: float, *, cuda: bool) -> float:
    """What the step takes beside gradients and states. width: bytes of a parameter's element.

    The denominator and the update of the largest tensor that is not projected; or, as a projection is renewed, the fp32 copy
    of the largest gradient, cuSOLVER's own, and its singular vectors.
    """
    plain = 2 * width * shape.vocab * shape.hidden
    copies = (width < 4) + cuda
    renewed = (
        4.0 * (copies * short * long + short * short + short * long) for short, long, count in _matrices(shape) if count
    )
    return max(plain, *renewed)
