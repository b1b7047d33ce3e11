"""The shape of a model that no family describes, with as many parameters as its own code makes. Loads torch when called."""

from __future__ import annotations

import dataclasses
import functools

from estimator.building.model import build_empty_model
from estimator.errors import InputError, MissingError
from estimator.model.shape import ModelShape, count_parameters
from estimator.setup import Setup


def counted_shape(shape: ModelShape) -> ModelShape:
    """``shape``, guessed from a config, with a feed-forward so narrow that it has no more parameters than the model; what is
    left over is ``extra_parameters``. Raises InputError as ``build_empty_model``, MissingError without torch."""
    parameters = _parameters(shape.name)
    for tried in (shape, dataclasses.replace(shape, experts=0, active_experts=0, shared_experts=0)):
        one, two = (count_parameters(dataclasses.replace(tried, ffn=width, dense_ffn=0)).total for width in (1, 2))
        over = max(count_parameters(tried).total - parameters, 0)
        narrower = tried.ffn - -(-over // (two - one))
        if narrower >= 1:
            fitted = dataclasses.replace(tried, ffn=narrower, dense_ffn=min(tried.dense_ffn, narrower) if over else tried.dense_ffn)  # fmt: skip
            return dataclasses.replace(fitted, extra_parameters=parameters - count_parameters(fitted).total)
    raise InputError(
        f"model: {shape.name!r} has {parameters:,} parameters, fewer than the keys of its config say; correct it"
    )


@functools.lru_cache(maxsize=32)
def _parameters(model: str) -> int:
    """Of a config by its path; shared ones once."""
    try:
        built = build_empty_model(Setup(model=model, attention="eager").resolved())  # which every class has
    except ImportError as error:
        raise MissingError(f"dry_run: needs {error.name}; pip install 'vramcalc-toolkit[all]'") from None
    return sum(parameter.numel() for parameter in built.parameters())
