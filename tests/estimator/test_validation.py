"""Judging predictions row by row: a fake estimator stands for the real one, so that the numbers are known."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from estimator.errors import InputError
from estimator.measured import MeasuredRun
from estimator.result import (
    CheckpointEstimate,
    Estimate,
    FitEstimate,
    MemoryEstimate,
    ModelSummary,
    NaiveEstimate,
    TimeEstimate,
)
from estimator.score import FitsTable
from estimator.setup import Setup
from estimator.units import Interval
from estimator.validation import SKIP_REASONS, UNPREDICTED_REASONS, unreadable_row, validate


def tenth(value: float) -> Interval:
    return Interval.within(value, below=0.1, above=0.1)


def estimate(setup: Setup) -> Estimate:
    """1,000 bytes allocated, 1,100 reserved, 1,200 on the device, 2 s, 50 tokens/s, a checkpoint of 300 B; 1,250 B fit."""
    if setup.model == "unknown":
        raise InputError("model: 'unknown' is not in the catalog")
    if setup.method == "dora":
        raise InputError("method: dora cannot be predicted")
    time = TimeEstimate(
        step_seconds=tenth(2.0),
        tokens_per_second=tenth(100.0),
        tokens_per_second_per_gpu=tenth(50.0),
        model_flops_per_step=1.0,
        mfu=None,
        parts=(),
        method="formula",
    )
    device = 1200.0 * setup.batch
    capacity = None if setup.accelerator is None else 1250
    return Estimate(
        setup=setup,
        model=ModelSummary(
            name="m", parameters=1, trainable_parameters=1, active_parameters=1, layers=1, hidden=1, vocab=1, inferred=False
        ),
        memory=MemoryEstimate(
            method="formula",
            phase="backward",
            parts=(),
            peak_allocated_bytes=tenth(1000.0),
            peak_reserved_bytes=tenth(1100.0),
            peak_device_bytes=tenth(device),
            peak_host_bytes=tenth(1.0),
        ),
        fits=FitEstimate(
            gpu=setup.accelerator,
            capacity_bytes=capacity,
            fits=None if capacity is None else device <= capacity,
            margin_bytes=None if capacity is None else round(capacity - device),
        ),
        fits_on=(),
        time=None if setup.accelerator is None else time,
        checkpoint=CheckpointEstimate(bytes=300, model_bytes=100, optimizer_bytes=200, run_disk_bytes=900),
        run=None,
        naive=NaiveEstimate(base={}, vram_bytes=1.0, years=None, reason=""),
        calibration=None,
        notes=(),
    )  # fmt: skip


def run(name: str, *, source: str = "lab: first", setup: dict[str, Any] | None = None, **measured: Any) -> MeasuredRun:
    settings = {"model": "nano", "accelerator": "T4", **(setup or {})}
    return MeasuredRun(run=name, source=source, setup=Setup.from_mapping(settings), **measured)


def test_every_measured_quantity_of_a_row_is_compared_with_its_own_prediction() -> None:
    everything = run(
        "a",
        peak_allocated_bytes=800,
        peak_reserved_bytes=1100,
        peak_device_bytes=1500,
        step_seconds=2.1,
        tokens_per_second_per_accelerator=25.0,
        checkpoint_bytes=300,
    )
    found = validate([everything], estimate)
    overall = dict(found.overall)
    assert list(overall) == [
        "peak_allocated", "peak_reserved", "peak_device", "step_seconds", "tokens_per_second", "checkpoint",
    ]  # fmt: skip
    errors = {name: score.bias for name, score in overall.items()}
    assert errors == pytest.approx(
        {
            "peak_allocated": 0.25,
            "peak_reserved": 0.0,
            "peak_device": -0.2,
            "step_seconds": 2 / 2.1 - 1,
            "tokens_per_second": 1.0,
            "checkpoint": 0.0,
        }
    )
    assert {name: score.coverage_90 for name, score in overall.items()} == {
        "peak_allocated": 0.0, "peak_reserved": 1.0, "peak_device": 0.0,
        "step_seconds": 1.0, "tokens_per_second": 0.0, "checkpoint": 1.0,
    }  # fmt: skip


def test_scores_are_grouped_by_the_source_before_its_colon() -> None:
    rows = [
        run("a", source="lab: page 1", peak_allocated_bytes=1000),
        run("b", source="lab: page 2", peak_allocated_bytes=500),
        run("c", source="other", peak_allocated_bytes=2000),
    ]
    by_source = {source: dict(scores) for source, scores in validate(rows, estimate).by_source}
    assert set(by_source) == {"lab", "other"}
    assert by_source["lab"]["peak_allocated"].n == 2
    assert by_source["lab"]["peak_allocated"].median_ape == pytest.approx(0.5)
    assert by_source["other"]["peak_allocated"].bias == pytest.approx(-0.5)


def test_fits_are_judged_on_runs_that_ran_out_of_memory_as_well() -> None:
    rows = [
        run("fit", peak_allocated_bytes=1000),
        run("full", outcome="oom"),
        run("too big", outcome="oom", setup={"batch": 2}),
        run("said too big", setup={"batch": 2}, peak_allocated_bytes=1000),
        run("nowhere", setup={"accelerator": None}, peak_allocated_bytes=1000),
    ]
    assert validate(rows, estimate).fits == FitsTable(true_fit=1, false_fit=1, true_oom=1, false_oom=1)


def test_the_peak_of_a_run_that_ran_out_of_memory_is_not_compared() -> None:
    found = validate([run("full", outcome="oom", peak_allocated_bytes=9)], estimate)
    assert found.overall == () and len(found.rows) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (run("a", setup={"model": "unknown"}, peak_allocated_bytes=1), "unknown model: model: 'unknown' is not in the catalog"),
        (run("a", setup={"method": "dora"}, peak_allocated_bytes=1), "unpredictable setup: method: dora cannot be predicted"),
        (run("a", outcome="failed", peak_allocated_bytes=1), "did not end: failed"),
        (run("a", outcome="timeout"), "did not end: timeout"),
        (run("a", setup={"accelerator": None}, peak_unstated_bytes=5), "nothing to compare: a peak of unstated kind"),
        (run("a", setup={"accelerator": None}), "nothing to compare: no peak, time or checkpoint"),
        (run("a", setup={"accelerator": None}, step_seconds=2.0), "accelerator not stated: no step time"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_predicted_is_skipped_with_a_documented_reason(row: MeasuredRun, reason: str) -> None:
    found = validate([row], estimate)
    assert found.rows == () and found.overall == ()
    assert [(skip.run, skip.reason) for skip in found.skipped] == [("a", reason)]
    assert reason.partition(":")[0] in SKIP_REASONS | UNPREDICTED_REASONS


def test_unreadable_rows_are_listed_with_the_skipped_ones() -> None:
    found = validate([], estimate, unreadable=[unreadable_row("r7", "", "method: 'magic' is not known")])
    assert [(skip.run, skip.reason) for skip in found.skipped] == [
        ("r7", "unreadable row: method: 'magic' is not known")
    ]


def test_a_quantity_without_a_prediction_is_said_while_the_others_count() -> None:
    row = run("a", setup={"accelerator": None}, peak_allocated_bytes=1000, step_seconds=2.0)
    found = validate([row], estimate)
    assert dict(found.overall)["peak_allocated"].n == 1 and "step_seconds" not in dict(found.overall)
    assert [(skip.run, skip.quantity, skip.reason) for skip in found.unpredicted] == [
        ("a", "step_seconds", "accelerator not stated: no step time")
    ]


def test_a_rate_that_the_catalog_lacks_is_said() -> None:
    def without_time(setup: Setup) -> Estimate:
        return dataclasses.replace(estimate(setup), time=None)

    found = validate([run("a", tokens_per_second_per_accelerator=3.0, peak_allocated_bytes=1)], without_time)
    assert [skip.reason for skip in found.unpredicted] == ["no rate known: T4 in bf16-mixed"]


def test_a_setup_is_predicted_once_however_many_rows_have_it() -> None:
    asked = []

    def counting(setup: Setup) -> Estimate:
        asked.append(setup)
        return estimate(setup)

    rows = [run(str(i), peak_allocated_bytes=1000 + i) for i in range(5)]
    assert dict(validate(rows, counting).overall)["peak_allocated"].n == 5
    assert len(asked) == 1


def test_bugs_are_not_skipped() -> None:
    def broken(setup: Setup) -> Estimate:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        validate([run("a", peak_allocated_bytes=1)], broken)
