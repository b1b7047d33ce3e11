"""How many setups a second the memory formula answers as a grid: ``python benchmarks/grid.py [SETUPS]``."""

from __future__ import annotations

import sys
import time

import numpy

from estimator.grid import grid_device_bytes, setup_grid
from estimator.memory.formula import memory_phases
from estimator.model.catalog import resolve_model
from estimator.setup import Setup

_CHUNK = 20_000
"""Setups of one call: as many as a core's cache holds."""


def main(setups: int) -> None:
    base = Setup(model="llama-3.1-8b", accelerator="H100-SXM-80GB", sharding="fsdp", checkpointing="full").resolved()
    shape = resolve_model(base.model)
    random = numpy.random.default_rng(0)
    batches, sequences = random.integers(1, 65, setups), random.integers(128, 32_768, setups)
    accelerators = 8 * random.integers(1, 2049, setups)
    started = time.perf_counter()
    for first in range(0, setups, _CHUNK):
        part = slice(first, first + _CHUNK)
        grid = setup_grid(base, batch=batches[part], seq=sequences[part], accelerators=accelerators[part])
        grid_device_bytes(shape, grid, reserve_bytes=2 * 2**30)
    print(f"{setups / (time.perf_counter() - started):,.0f} setups a second as grids of {_CHUNK:,}")
    started = time.perf_counter()
    for _ in range(1000):
        memory_phases(shape, base)
    print(f"{time.perf_counter() - started:.3f} ms for one alone, with its parts")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
