"""Many setups at once: the same record with numpy arrays in its numbers, for the formulas to answer in one pass.

What is not a number (model, method, precision, sharding, ...) is the same for all of a grid.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from estimator.arrays import Number
from estimator.memory.device import allocator_room_bytes, device_bytes
from estimator.model.shape import ModelShape
from estimator.setup import Setup

AXES = (
    "accelerators", "data_parallel", "tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel", "shard_size",
    "batch", "seq", "accumulation", "eval_batch",
)  # fmt: skip
"""What may vary within a grid."""


class SetupGrid(Setup):
    """A setup whose ``AXES`` may be integer arrays, all of shapes that broadcast together. Not checked: see ``possible``."""

    __slots__ = ()

    def __post_init__(self) -> None:
        pass


def setup_grid(base: Setup, **axes: Any) -> SetupGrid:
    """``base`` (resolved, its sharding stated) with arrays in place of some numbers.

    Raises AssertionError for a name that is not in ``AXES``. The data-parallel ranks follow from the others.
    """
    assert set(axes) <= set(AXES), sorted(set(axes) - set(AXES))
    values = {spec.name: getattr(base, spec.name) for spec in dataclasses.fields(base)}
    grid = SetupGrid(**(values | axes | {"data_parallel": None}))
    object.__setattr__(grid, "data_parallel", grid.data_ranks)
    return grid


def grid_device_bytes(
    shape: ModelShape, grid: SetupGrid, *, reserve_bytes: int = 0, capacity_bytes: int | None = None
) -> Number:
    """The peak of a device's memory of every setup, in bytes (float64): as ``estimate`` says of each alone."""
    return device_bytes(shape, grid, allocator_room_bytes(grid, reserve_bytes, capacity_bytes))
