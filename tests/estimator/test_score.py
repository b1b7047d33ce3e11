"""Scores of predictions: expected numbers from numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.score import Comparison, FitsTable, count_fits, percentile, score, source_name


def comparison(predicted: float, measured: float, half_width: float = 0.1) -> Comparison:
    low, high = predicted * (1 - half_width), predicted * (1 + half_width)
    return Comparison(predicted=predicted, low=low, high=high, measured=measured)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 1))
def test_percentiles_interpolate_as_numpy_does(values: list[float], share: float) -> None:
    assert percentile(values, share) == pytest.approx(float(np.percentile(values, share * 100)), rel=1e-9, abs=1e-9)


def test_a_score_is_the_one_worked_out_by_hand() -> None:
    # Signed errors: +10%, -20%, 0%, +50%; the first and the third measurement lie inside +-10% of the prediction.
    found = score([comparison(110, 100), comparison(80, 100), comparison(100, 100), comparison(150, 100)])
    assert found is not None
    assert found.n == 4
    assert found.median_ape == pytest.approx(0.15)
    assert found.p90_ape == pytest.approx(0.41)  # 0.2 + 0.7 x (0.5 - 0.2)
    assert found.p95_ape == pytest.approx(0.455)
    assert found.max_ape == pytest.approx(0.5)
    assert found.bias == pytest.approx(0.05)
    assert found.coverage_90 == 0.5


def test_bias_is_the_median_signed_error_and_not_the_mean() -> None:
    found = score([comparison(90, 100), comparison(90, 100), comparison(900, 100)])
    assert found is not None and found.bias == pytest.approx(-0.1)


def test_nothing_has_no_score() -> None:
    assert score([]) is None


def test_fits_are_counted_against_what_happened() -> None:
    said_and_did = [(True, True)] * 3 + [(True, False)] * 2 + [(False, False)] * 5 + [(False, True)]
    assert count_fits(said_and_did) == FitsTable(true_fit=3, false_fit=2, true_oom=5, false_oom=1)


def test_the_source_is_the_text_before_the_first_colon() -> None:
    assert source_name("PyPI vramcalc: row 3: bf16") == "PyPI vramcalc"
    assert source_name("NVIDIA/NeMo") == "NVIDIA/NeMo"
