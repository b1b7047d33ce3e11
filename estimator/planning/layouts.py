"""The ways to lay a model out over devices that a space allows, as flat arrays."""

from __future__ import annotations

from typing import Any

from estimator.grid import setup_grid
from estimator.model.shape import ModelShape
from estimator.planning.space import Space
from estimator.possible import possible
from estimator.setup import Setup

Columns = dict[str, Any]
"""Integer arrays of one length, by the names of settings."""


def layouts(space: Space, shape: ModelShape, base: Setup) -> Columns:
    """Counts of devices and parallel degrees that can be, each once; for one micro-batch, which needs no pipeline."""
    numbers = space.numbers(base, experts=bool(shape.experts))
    if "pipeline_parallel" not in space.given:
        numbers["pipeline_parallel"] = (1,)
    del numbers["batch"]
    numbers.pop("accumulation", None)
    return _can_be(shape, base, _meshed(numbers))


def candidates(space: Space, shape: ModelShape, base: Setup, sequences: int | None) -> Columns:
    """The same with micro-batches, and the accumulation that makes ``sequences`` of them over all devices."""
    import numpy

    flat = _meshed(space.numbers(base, experts=bool(shape.experts)))
    if sequences is not None:
        model = flat["tensor_parallel"] * flat["pipeline_parallel"] * flat["context_parallel"]
        once = numpy.maximum(flat["accelerators"] // model, 1) * flat["batch"]
        flat = kept(flat | {"accumulation": sequences // once}, (sequences >= once) & (sequences % once == 0))
    flat = _can_be(shape, base, flat)
    return kept(flat, (flat["pipeline_parallel"] == 1) | (flat["accumulation"] >= flat["pipeline_parallel"]))


def kept(columns: Columns, mask: Any) -> Columns:
    """The places where ``mask`` holds."""
    return {name: values[mask] for name, values in columns.items()}


def _meshed(values: dict[str, tuple[int, ...]]) -> Columns:
    """Every combination."""
    import numpy

    mesh = numpy.meshgrid(*(numpy.array(some, dtype=numpy.int64) for some in values.values()), indexing="ij")
    return {name: grid.ravel() for name, grid in zip(values, mesh, strict=True)}


def _can_be(shape: ModelShape, base: Setup, flat: Columns) -> Columns:
    """Without what cannot be, and what nobody wants: tensor ranks over a slow network."""
    model = flat["tensor_parallel"] * flat["pipeline_parallel"] * flat["context_parallel"]
    flat = kept(flat, flat["accelerators"] % model == 0)
    grid = setup_grid(base, **flat)
    alone = grid.data_ranks * grid.context_parallel == 1
    mask = possible(shape, grid)
    if base.sharding == "none":
        mask &= alone
    elif base.offload is None or base.sharding == "fsdp":  # DeepSpeed offloads what one device has as well
        mask &= ~alone
    mask &= (grid.tensor_parallel <= grid.gpus_per_node) & (grid.expert_parallel <= grid.accelerators)
    return kept(flat, mask)
