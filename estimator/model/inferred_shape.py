"""The shape of a model of which only the parameter count is known: a chain of Llama-like decoders."""

from __future__ import annotations

import functools
import itertools

from estimator.errors import InputError
from estimator.model.families import shape_of_family
from estimator.model.shape import ModelShape, count_parameters

# (layers, hidden) of well-known decoders that the inferred chain passes through: SmolLM2-135M, Llama-3.2-1B and 3B,
# Llama-3.1 8B, 70B and 405B, and GPT-1T (models.csv).
_ANCHORS = ((1, 64), (4, 256), (12, 768), (16, 2048), (28, 3072), (32, 4096), (80, 8192), (126, 16384), (160, 25600))


@functools.cache
def _chain() -> list[tuple[int, int]]:
    """(layers, hidden) in small steps, neither ever falling, so that a larger count never gives a smaller shape."""
    steps: list[tuple[int, int]] = []
    for (layers, hidden), (next_layers, next_hidden) in itertools.pairwise(_ANCHORS):
        count = max(next_layers - layers, (next_hidden - hidden) // 64)
        for i in range(count):
            depth = layers + (next_layers - layers) * i // count
            width = hidden + (next_hidden - hidden) * i // count // 64 * 64
            if not steps or steps[-1] != (depth, width):
                steps.append((depth, width))
    layers, hidden = _ANCHORS[-1]
    steps += [(layers + 4 * i, hidden + 512 * i) for i in range(400)]
    return steps


def _chain_shape(layers: int, hidden: int) -> ModelShape:
    heads = max(1, hidden // 128)
    vocab = 32_000 + 96_256 * min(max(hidden - 768, 0), 1280) // 1280
    return shape_of_family(
        "llama",
        name="inferred",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=min(heads, 8),
        head_dim=128,
        ffn=hidden * 55 // 16,
        gated=True,
        vocab=vocab,
        tied_embeddings=hidden <= 3072,
        inferred=True,
    )


def infer_shape(parameters: int) -> ModelShape:
    """A Llama-like shape with exactly this many parameters: grouped queries, gated feed-forward of 3.4 h.

    The largest member of a chain of shapes that holds no more; what is left over counts in states and checkpoints
    (``extra_parameters``), so that more parameters never lower an estimate. Raises InputError outside 3·10^6 to 10^14.
    """
    if not 3 * 10**6 <= parameters <= 10**14:
        raise InputError(f"params: {parameters:g} is outside 3e6 to 1e14; write for example --params 8e9")
    import bisect
    import dataclasses

    def total(step: tuple[int, int]) -> int:
        return count_parameters(_chain_shape(*step)).total

    steps = _chain()
    index = bisect.bisect_right(steps, parameters, key=total) - 1
    shape = _chain_shape(*steps[max(index, 0)])
    left = parameters - count_parameters(shape).total
    return dataclasses.replace(shape, name=f"{parameters:.4g} parameters", extra_parameters=left)
