"""The bytes that a checkpoint takes on the disk.  (being written)"""

from __future__ import annotations

from estimator.result import CheckpointEstimate
from estimator.setup import Setup
from estimator.shape import ModelShape


def checkpoint_bytes(shape: ModelShape, setup: Setup) -> tuple[int, int]:
    """(model, optimizer) bytes of one checkpoint as the installed libraries write it."""
    raise NotImplementedError


def checkpoint_estimate(shape: ModelShape, setup: Setup, *, kept: int = 2) -> CheckpointEstimate:
    raise NotImplementedError
