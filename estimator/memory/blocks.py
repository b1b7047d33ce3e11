"""What the caching allocator's blocks hold beyond the tensors that persist in them; bytes."""

from __future__ import annotations

import functools

from estimator.arrays import Number, is_plain, maximum, minimum, where
from estimator.hardware import is_cpu
from estimator.model.shape import ModelShape
from estimator.setup import Setup
from estimator.units import MIB

_SEGMENT, _OWN, _ROUND = 20 * MIB, 10 * MIB, 2 * MIB
_MEAN_REST = 0.25 / 20
"""Of blocks that share a segment of 20 MiB: in every other one the last keeps a rest of up to 1 MiB."""
_LAYERS = 4
"""After so many what is left over of the layers before is used as it will be."""


def matrix_slack(shape: ModelShape, setup: Setup, width: float, table_width: float, *, copies: int = 1) -> Number:
    """Of ``copies`` tensors for each matrix and table on the device, made one after the other. width, table_width: bytes of an
    element.

    From 10 MiB on a tensor has a segment of its own, a multiple of 2 MiB, and keeps a rest of up to 1 MiB; smaller ones, from
    1 MiB on, share segments.
    """
    if shape.inferred or is_cpu(setup.accelerator):
        return 0.0
    h, tensor = shape.hidden, setup.tensor_parallel
    matrices = [] if shape.latent_attention else [shape.query_width, shape.kv_width, shape.kv_width, shape.query_width]
    matrices += [] if shape.experts else [shape.plain_ffn] * shape.matrices
    sizes = tuple(h * outputs * width for outputs in matrices for _ in range(copies))
    slack = sum(_own_rest(size / tensor) for size in sizes) + _shared_rests_of(sizes, tensor)
    tables = copies * (1 if shape.tied_embeddings else 2)
    return slack * shape.layers / setup.pipeline_parallel + tables * _own_rest(shape.vocab * h * table_width / tensor)


def mean_rest(setup: Setup, size: Number, width: int) -> Number:
    """Of one tensor of ``size`` bytes and rows of ``width`` elements that comes and goes among others. Powers of two fill
    segments without a rest. With its rest a larger one is never smaller."""
    if is_cpu(setup.accelerator):
        return 0.0
    own = _own_rest(size)
    if not width & (width - 1):
        return own
    return own + where(size > MIB, maximum(minimum(_MEAN_REST * size, _OWN - size), 0.0), 0.0)


def _own_rest(size: Number) -> Number:
    rest = -size % _ROUND
    return where(size >= _OWN, where(rest <= MIB, rest, 0.0), 0.0)


def _shared_rests_of(sizes: tuple[float, ...], ways: Number) -> Number:
    if is_plain(ways):
        return _shared_rests(tuple(size / ways for size in sizes))
    import numpy

    few, places = numpy.unique(ways, return_inverse=True)
    rests = numpy.array([_shared_rests(tuple(size / way for size in sizes)) for way in few.tolist()])
    return rests[places].reshape(numpy.shape(ways))


@functools.lru_cache(maxsize=256)
def _shared_rests(sizes: tuple[float, ...]) -> float:
    """Of one layer, on average; best fit, as the allocator has it."""
    shared = [size for size in sizes if MIB < size < _OWN]
    left: list[float] = []
    slack = 0.0
    for size in shared * _LAYERS:
        place = min((rest for rest in left if rest >= size), default=0.0)
        if place:
            left.remove(place)
        else:
            place = float(_SEGMENT)
        if place - size <= MIB:
            slack += place - size
        else:
            left.append(place - size)
    return slack / _LAYERS
