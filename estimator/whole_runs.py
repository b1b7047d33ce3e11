"""Published whole trainings against what the estimate says of them: accelerator-hours, from tokens and a layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from estimator.estimate import estimate
from estimator.model.catalog import read_data
from estimator.run.cost import RunRequest
from estimator.setup import Setup, setting_types
from estimator.units import Interval

_HOURS_PER_DAY = 24.0


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
        tokens=round(float(row["tokens_b"]) * 1e9),
        gpu_hours=float(layout["published_gpu_hours"] or row["gpu_hours"] or 0) or _hours(row),
        stated=layout["stated"] == "yes",
        layout_source=layout["source"],
    )


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
    return WholeRunScore(run=run, predicted=found.gpu_hours)
