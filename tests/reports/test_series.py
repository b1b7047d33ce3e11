from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.errors import InputError
from estimator.measured import MeasuredRun
from estimator.result import Estimate
from estimator.setup import Setup
from reports.series import ALLOCATED, CHECKPOINT, MAX_SERIES, STEP, Predictor, panel, residuals, sample

NO_LAW = Predictor(None)


def run_of(peak: int, **settings: object) -> MeasuredRun:
    setup = Setup.from_mapping({"model": "nano", **settings})
    return MeasuredRun(run=f"{setup}", setup=setup, peak_allocated_bytes=peak, parameters=1_000_000)


def test_a_series_holds_only_runs_that_differ_in_the_axis_alone(runs: list[MeasuredRun]) -> None:
    found = panel(runs, ALLOCATED, "seq", NO_LAW, None)
    assert found is not None
    series = {entry.label: [point.x for point in entry.points] for entry in found.series}
    assert series["micro, batch 4"] == [64, 128, 256]
    assert all(point.y > 0 for entry in found.series for point in entry.points)


def test_runs_that_did_not_complete_are_no_points(runs: list[MeasuredRun]) -> None:
    found = panel(runs, ALLOCATED, "batch", NO_LAW, None)
    assert found is not None
    assert {point.x for entry in found.series for point in entry.points} <= {1, 2, 4, 8}


def test_an_axis_along_which_nothing_varies_has_no_figure() -> None:
    runs = [run_of(100, seq=64), run_of(200, seq=128)]
    assert panel(runs, ALLOCATED, "batch", NO_LAW, None) is None
    assert panel(runs, STEP, "seq", NO_LAW, None) is None
    assert panel([], ALLOCATED, "seq", NO_LAW, None) is None


def test_series_beyond_what_fits_are_counted() -> None:
    runs = [run_of(batch * seq, batch=batch, seq=seq) for batch in range(1, 9) for seq in (64, 128)]
    found = panel(runs, ALLOCATED, "seq", NO_LAW, None)
    assert found is not None
    assert (len(found.series), found.left_out) == (MAX_SERIES, 8 - MAX_SERIES)


def test_series_that_would_hide_each_other_are_drawn_once(runs: list[MeasuredRun]) -> None:
    found = panel(runs, CHECKPOINT, "seq", NO_LAW, None)
    assert found is not None
    assert [entry.label for entry in found.series] == ["nano", "micro", "mini"]


def test_the_curve_is_the_law_at_every_point_of_the_axis(
    runs: list[MeasuredRun], estimate_of: Callable[[Setup], Estimate]
) -> None:
    found = panel(runs, STEP, "batch", Predictor(estimate_of), None)
    assert found is not None
    curve = found.series[-1].curve
    assert curve is not None
    assert (curve.xs[0], curve.xs[-1]) == (1, 8)
    # The law of the fixture: 4 ms, and 6 FLOPs for each of 5 million parameters and 128 tokens at 50 GFLOP/s.
    assert curve.ys[-1] == pytest.approx(0.004 + 6 * 5e6 * 8 * 128 / 50e9)
    assert all(low < y < high for low, y, high in zip(curve.lows, curve.ys, curve.highs, strict=True))


def test_points_tell_whether_the_law_had_seen_them(runs: list[MeasuredRun]) -> None:
    fitted = frozenset(run.run for run in runs if run.setup.model != "small")
    found = panel(runs, ALLOCATED, "parameters", NO_LAW, fitted)
    assert found is not None
    assert {point.x: point.unseen for entry in found.series for point in entry.points} == {
        1e6: False, 5e6: False, 20e6: False, 60e6: True,
    }  # fmt: skip


def test_a_residual_is_predicted_over_measured_less_one(estimate_of: Callable[[Setup], Estimate]) -> None:
    setup = Setup(model="nano", seq=64)
    half = MeasuredRun(run="a", setup=setup, checkpoint_bytes=6_000_000)
    (residual,) = residuals([half], Predictor(estimate_of), None)
    assert residual.error == 1.0
    assert residual.within is None  # the checkpoint of the fixture is exact


def test_what_cannot_be_predicted_is_left_out_and_its_reason_kept(runs: list[MeasuredRun]) -> None:
    def refuse(setup: Setup) -> Estimate:
        raise InputError(f"model: {setup.model} is unknown")

    predictor = Predictor(refuse)
    assert residuals(runs, predictor, None) == []
    assert predictor.reason(runs[0].setup) == "model: nano is unknown"


def test_each_setup_is_estimated_once(runs: list[MeasuredRun], estimate_of: Callable[[Setup], Estimate]) -> None:
    asked: list[Setup] = []

    def count(setup: Setup) -> Estimate:
        asked.append(setup)
        return estimate_of(setup)

    predictor = Predictor(count)
    for quantity in (ALLOCATED, STEP):
        panel(runs, quantity, "seq", predictor, None)
    residuals(runs, predictor, None)
    assert len(asked) == len(set(asked))


@given(st.integers(1, 10_000), st.integers(2, 1000), st.integers(2, 40))
def test_samples_rise_from_the_lowest_to_the_highest(low: int, ratio: int, count: int) -> None:
    xs = sample(low, low * ratio, count)
    assert (xs[0], xs[-1]) == (low, low * ratio)
    assert xs == sorted(set(xs))
    assert len(xs) <= count
