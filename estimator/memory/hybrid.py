"""What the layers of a hybrid keep, as shares of a layer with a feed-forward: the rest of the formula knows that kind only.

Assumed: mixers run as mamba_ssm's and fla's fused kernels, layers are checkpointed one by one, and every feed-forward's layer
carries its share of mixers and attention (which of them comes first moves the peak by less than a layer). Not measured.
"""

from __future__ import annotations

from estimator.arrays import Number
from estimator.memory.widths import Widths
from estimator.model.mixer import mixer_activation_bytes
from estimator.model.shape import ModelShape
from estimator.setup import Setup


def branch_shares(shape: ModelShape) -> tuple[float, float]:
    """(layers, layers with attention) to each feed-forward: 1 and 1 in a transformer."""
    return shape.layers / shape.feed_forwards, shape.attention_layers / shape.feed_forwards


def mixer_bytes(shape: ModelShape, setup: Setup, size: Widths) -> Number:
    """Bytes per token that mixers keep, their share of one feed-forward's layer."""
    if shape.mixer is None:
        return 0.0
    kept = mixer_activation_bytes(shape.mixer, size.compute, trains=setup.method in ("full", "freeze"))
    return kept * shape.mixer.layers / shape.feed_forwards / setup.tensor_parallel
