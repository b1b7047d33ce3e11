"""Cheaper ways that change what comes out of the training: methods and precisions that nobody asked for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from estimator.errors import InputError
from estimator.planning.search import Limits, Plans, plan
from estimator.planning.space import PRETRAINING_TOKENS, Space
from estimator.result import Estimate
from estimator.run.cost import RunRequest

_WORTH_IT = 0.1
"""Share of the price (of owned devices of the time) that another method must save to be named beside plans that fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """The cheapest plan with one setting changed, by the formula."""

    flags: str
    note: str
    """What changes."""
    found: Estimate


_CHANGES = (
    ("method", "lora", "trains adapters only"),
    ("method", "qlora", "trains adapters only, on a base in 4 bits"),
    ("precision", "bf16", "weights, gradients and optimizer states in bf16"),
)


def alternatives(space: Space, request: RunRequest, limits: Limits, plans: Plans) -> tuple[Alternative, ...]:
    """Of what was not asked for what is cheaper than the cheapest of ``plans``; where none fits, all that does."""
    pretraining = (request.tokens(space.seq) or 0) >= PRETRAINING_TOKENS  # no adapter learns that much
    now = _price(plans.front[-1]) if plans.front else math.inf
    found = []
    for name, value, note in _CHANGES:
        given = space.given.get(name, ())
        if value in given or (given and plans.fitting) or (pretraining and name == "method"):
            continue
        # The cheapest is Trainer's wherever it has the choice: what other engines hide is of many devices.
        changed = {"framework": ("hf-trainer",), "offload": (None,), **space.given, name: (value,)}
        try:
            other = plan(dataclasses.replace(space, given=changed), request, limits)
        except InputError:  # a framework, or accelerators, that do not have it
            continue
        if other.front and _price(other.front[-1]) < now * (1 - _WORTH_IT):
            found.append(Alternative(flags=f"--{name} {value}", note=note, found=other.front[-1]))
    return tuple(found)


def _price(found: Estimate) -> float:
    """Dollars, or hours where these cost nothing."""
    assert found.run is not None
    cost = found.run.cost_usd
    return cost.value if cost is not None and cost.value else found.run.hours.value
