"""What measured runs ran on, as flat facts: devices, libraries, hosts."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from estimator.measured import MeasuredRun
from reports import scale

_MOST_VALUES = 4


def environment_facts(runs: Sequence[MeasuredRun]) -> list[tuple[str, str, int]]:
    """(what, value, number of runs that state it), in the order in which they first occur.

    What differs from run to run, like the load, is told by its range or by how many values there are.
    """
    facts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        for what, value in dict(_facts_of(run)).items():
            facts[what][value] += 1
    rows = []
    for what, values in facts.items():
        if len(values) <= _MOST_VALUES:
            rows += [(what, value, count) for value, count in values.items()]
        else:
            rows.append((what, _spread(list(values)), values.total()))
    return rows


def _spread(values: Sequence[str]) -> str:
    try:
        numbers = sorted(float(value) for value in values)
    except ValueError:
        return f"{len(values)} different ones: {values[0]}, {values[1]}, ..."
    return f"{numbers[0]:.6g} to {numbers[-1]:.6g}"


def _facts_of(run: MeasuredRun) -> Iterator[tuple[str, str]]:
    stated = {
        "accelerator": run.setup.accelerator,
        "framework": run.setup.framework,
        "torch": run.torch,
        "transformers": run.transformers,
    }
    if run.environment is not None:
        try:
            yield from _flat("", json.loads(run.environment))
            stated = {"accelerator": run.setup.accelerator, "framework": run.setup.framework}
        except (ValueError, RecursionError):  # a table from elsewhere may hold plain text here
            yield "environment", run.environment
    for what, value in stated.items():
        if value:
            yield what, value


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list):
        yield prefix or "environment", ", ".join(str(item) for item in value)
    elif isinstance(value, int | float) and prefix.endswith("_bytes"):
        yield prefix.removesuffix("_bytes"), scale.memory_text(value)
    elif value is not None:
        yield prefix or "environment", str(value)
