"""How many setups a second a plan's search predicts (memory, time, money): ``python benchmarks/plan_speed.py``."""

from __future__ import annotations

import math
import time

from estimator.planning.search import Limits, plan
from estimator.planning.space import Space
from estimator.run.cost import RunRequest


def main() -> None:
    space = Space.of(
        {"model": ["llama-3.1-70b"], "seq": ["8192"], "framework": ["torchtitan"], "batch": [*range(1, 33)]},
        global_batch=2**10 * 45,  # which most of the batches divide
        most_accelerators=2**14,
    )
    request = RunRequest(dataset_tokens=10**11)
    plan(space, request, Limits(hours=1e-9))  # what is read once
    seconds = math.inf
    for _ in range(3):
        started = time.process_time()
        plans = plan(space, request, Limits())
        seconds = min(seconds, time.process_time() - started)
    print(
        f"{plans.searched:,} setups in {seconds:.2f} s of one core: {plans.searched / seconds:,.0f} a second, best of 3"
    )


if __name__ == "__main__":
    main()
