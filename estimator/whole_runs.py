"""Published whole trainings against what the estimate says of them: accelerator-hours, from tokens and a layout.

Where nobody states the layout, the interval holds those that could have been: other counts of devices, parallel degrees,
micro-batches, checkpointing and sharding that fit and take as many tokens a step, one as likely as the next.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from estimator.estimate import estimate
from estimator.grid import grid_device_bytes, setup_grid
from estimator.hardware import find_accelerator
from estimator.model.catalog import read_data, resolve_model
from estimator.planning.bulk import step_seconds_in_bulk
from estimator.planning.layouts import candidates
from estimator.planning.space import Space
from estimator.run.cost import RunRequest
from estimator.setup import Setup, setting_types
from estimator.units import Interval

_HOURS_PER_DAY = 24.0
_COUNTS = 8
"""Times fewer or more devices than assumed that a run of an unknown layout may have had."""
_MOST_DEVICES = 2**14


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """One published training. The layout is the source's where ``stated``, else assumed."""

    name: str
    setup: Setup
    tokens: int
    gpu_hours: float
    stated: bool
    """Size, tokens, layout and the hours of the pretraining alone are all published: judged by its error. The others only
    by whether the interval holds."""
    layout_stated: bool
    layout_source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRunScore:
    run: WholeRun
    predicted: Interval
    """Accelerator-hours."""

    @property
    def error(self) -> float:
        """Predicted / published - 1."""
        return self.predicted.value / self.run.gpu_hours - 1

    @property
    def held(self) -> bool:
        return self.predicted.low <= self.run.gpu_hours <= self.predicted.high


def whole_runs() -> tuple[WholeRun, ...]:
    """Those of ``whole_runs.csv`` that have a layout in ``whole_run_layouts.csv``, in the layouts' order."""
    published = {row["model"]: row for row in read_data("whole_runs.csv")}
    return tuple(_whole_run(layout, published[layout["run"]]) for layout in read_data("whole_run_layouts.csv"))


def skipped_runs() -> dict[str, int]:
    """Why the other rows of ``whole_runs.csv`` cannot be predicted, and how many."""
    known = {layout["run"] for layout in read_data("whole_run_layouts.csv")}
    return dict(Counter(_reason(row) for row in read_data("whole_runs.csv") if row["model"] not in known))


def _reason(row: dict[str, str]) -> str:
    if "MLPerf" in row["model"]:
        return "stops at a target quality: no tokens"
    if row["method"] == "rlhf":
        return "generates as well as trains"
    if not row["tokens_b"]:
        return "no tokens stated"
    return "no layout"


def _whole_run(layout: dict[str, str], row: dict[str, str]) -> WholeRun:
    settings = {name: value for name, value in layout.items() if name in setting_types()}
    return WholeRun(
        name=layout["run"],
        setup=Setup.from_mapping(settings | {"accelerator": row["accelerator"]}),
        tokens=round(_billions(row) * 1e9),
        gpu_hours=float(layout["published_gpu_hours"] or row["gpu_hours"] or 0) or _hours(row),
        stated=layout["stated"] == "yes",
        layout_stated=layout["stated"] in ("yes", "layout"),
        layout_source=layout["source"],
    )


def _billions(row: dict[str, str]) -> float:
    """Tokens: of "15T+" half of the next trillion as well."""
    stated = float(row["tokens_b"])
    return stated + 500.0 if f"{stated / 1000:g}T+ tokens" in row["notes"] else stated


def _hours(row: dict[str, str]) -> float:
    """Accelerator-hours where the source gives wall time."""
    wall = float(row["hours"]) if row["hours"] else float(row["days"]) * _HOURS_PER_DAY
    return wall * float(row["n_gpus"])


def score_whole_runs() -> tuple[WholeRunScore, ...]:
    """Every run of ``whole_runs`` predicted by the formulas alone."""
    return tuple(_score(run) for run in whole_runs())


def _score(run: WholeRun) -> WholeRunScore:
    found = estimate(run.setup, request=RunRequest(dataset_tokens=run.tokens)).run
    assert found is not None, run.name
    hours = found.gpu_hours
    return WholeRunScore(run=run, predicted=hours if run.layout_stated else _of_any_layout(run, hours))


def _of_any_layout(run: WholeRun, assumed: Interval) -> Interval:
    """``assumed``, the estimate of one layout, widened to 90% of what all layouts would take, each as uncertain as that one."""
    import numpy

    hours = _hours_by_layout(run)
    points = [NormalDist().inv_cdf((place + 0.5) / 100) / NormalDist().inv_cdf(0.95) for place in range(100)]
    sides = {1: math.log(assumed.high / assumed.value), -1: math.log(assumed.value / assumed.low)}
    doubt = numpy.exp([point * sides[1 if point > 0 else -1] for point in points])
    low, high = numpy.quantile(numpy.outer(hours, doubt), (0.05, 0.95))
    return Interval(value=assumed.value, low=min(low, assumed.low), high=max(high, assumed.high))


def _hours_by_layout(run: WholeRun) -> Any:
    """Accelerator-hours of the steps by every layout that fits."""
    import numpy

    setup = run.setup.resolved()
    shape, count = resolve_model(setup.model), setup.accelerators
    assert setup.accelerator is not None
    usable = find_accelerator(setup.accelerator).usable_low_bytes
    if count > setup.gpus_per_node:
        counts = [count * 2**power // _COUNTS for power in range(2 * _COUNTS.bit_length() - 1)]
    else:
        counts = [count]
    space = Space.of(
        {
            "model": [setup.model], "seq": [setup.seq], "framework": [setup.framework], "precision": [setup.precision],
            "accelerator": [setup.accelerator], "accelerators": [some for some in counts if some <= _MOST_DEVICES],
            "optimizer": [setup.optimizer], "attention": [setup.attention], "loss": [setup.loss], "compile": [setup.compile],
            "sharding": ["zero1", "fsdp"], "checkpointing": ["none", "selective", "full"],
        }
    )  # fmt: skip
    found = []
    for base in space.bases():
        columns = candidates(space, shape, base, setup.tokens_per_step // setup.seq)
        grid = setup_grid(base, **columns)
        fits = grid_device_bytes(shape, grid) <= usable
        seconds = step_seconds_in_bulk(shape, grid)
        found.append((seconds * columns["accelerators"])[fits] / setup.tokens_per_step)
    return numpy.concatenate(found) * run.tokens / 3600
