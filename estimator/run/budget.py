"""What a sum of money trains: tokens and epochs of this model on these machines, and what the same compute does best."""

from __future__ import annotations

import math
from collections.abc import Callable

from estimator.errors import InputError
from estimator.result import BudgetEstimate, TimeEstimate
from estimator.run.prices import Price
from estimator.run.wall_time import RunClock
from estimator.setup import Setup
from estimator.units import Interval

TOKENS_PER_PARAMETER = 20
"""Compute-optimal pretraining (Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022, table 3)."""
_MOST_STEPS = 10**15


def budget_estimate(
    dollars: float,
    *,
    setup: Setup,
    clock: RunClock,
    time: TimeEstimate,
    price: Price,
    parameters: int,
    tokens_per_epoch: int | None,
) -> BudgetEstimate:
    """The most that ``dollars`` pay for (InputError at a price of 0), start-up, checkpoints and failures included; the low end of each interval is what
    they pay for at the high ends of price and time."""
    rate = price.usd_per_gpu_hour
    if not rate.low:
        raise InputError("budget: at a price of 0 any sum pays for everything; write --price above 0")

    def steps(cost_end: str) -> int:
        def affordable(count: int) -> bool:
            cost = clock.seconds(count).scaled(setup.accelerators / 3600).times(rate)
            return bool(getattr(cost, cost_end) <= dollars)

        return _largest(affordable)

    counts = Interval(value=steps("value"), low=steps("high"), high=steps("low"))
    tokens = counts.scaled(setup.tokens_per_step)
    # FLOPs that the money buys at this rate of work: N parameters on 20 N tokens take 6·N·20 N of them.
    flops = tokens.scaled(time.model_flops_per_step / setup.tokens_per_step)
    optimal = Interval(
        **{end: math.sqrt(getattr(flops, end) / (6 * TOKENS_PER_PARAMETER)) for end in ("value", "low", "high")}
    )
    hours = dollars / setup.accelerators
    return BudgetEstimate(
        budget_usd=dollars,
        price_usd_per_gpu_hour=rate.value,
        price_source=price.source,
        hours=rate.inverse(hours),
        steps=counts,
        tokens=tokens,
        epochs=None if tokens_per_epoch is None else tokens.scaled(1 / tokens_per_epoch),
        chinchilla_tokens=TOKENS_PER_PARAMETER * parameters,
        chinchilla_share=tokens.scaled(1 / (TOKENS_PER_PARAMETER * parameters)),
        optimal_parameters=optimal,
        optimal_tokens=optimal.scaled(TOKENS_PER_PARAMETER),
    )


def _largest(affordable: Callable[[int], bool]) -> int:
    """The largest count for which the monotone ``affordable`` holds; 0 where none does."""
    if not affordable(1):
        return 0
    low, high = 1, 2
    while high < _MOST_STEPS and affordable(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return low
