"""Answers about a shape and a setup that one estimate asks for several times."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from estimator.model.shape import ModelShape
from estimator.setup import Setup

_Answer = TypeVar("_Answer")


def remembered(compute: Callable[[ModelShape, Setup], _Answer]) -> Callable[[ModelShape, Setup], _Answer]:
    """``compute`` with its last answers kept. Grids, whose numbers are arrays and have no hash, are computed each time."""
    known = functools.lru_cache(maxsize=64)(compute)

    @functools.wraps(compute)
    def answer(shape: ModelShape, setup: Setup) -> _Answer:
        try:
            return known(shape, setup)
        except TypeError:
            return compute(shape, setup)

    return answer
