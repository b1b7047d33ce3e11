"""From a step to a run, and the naive sums of the story."""

from __future__ import annotations

import pytest

from estimator.cost import RunRequest, catalog_price
from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.setup import Setup

H100 = {"accelerator": "H100-SXM-80GB"}


def test_the_naive_product_of_the_story_is_38400_gibibytes() -> None:
    naive = estimate(Setup(model="400e9", seq=8192)).naive
    assert naive.vram_bytes / 2**30 == pytest.approx(38_400)


def test_the_naive_years_are_a_straight_proportion_of_the_small_runs_rate() -> None:
    # 9,846 samples of 512 tokens in 45 minutes, times 800 in parameters, over 3T tokens: about 40,700 years on one card.
    request = RunRequest(dataset_tokens=3 * 10**12)
    one = estimate(Setup(model="400e9", seq=8192), request=request).naive
    assert one.years == pytest.approx(3e12 * 800 / (9846 * 512 / 2700) / (365.25 * 86400))
    many = estimate(Setup(model="400e9", seq=8192, accelerators=480), request=request).naive
    assert one.years is not None and many.years == pytest.approx(one.years / 480)


def test_a_run_is_its_steps_times_the_step() -> None:
    result = estimate(Setup(model="8e9", batch=2, accelerators=8, **H100), request=RunRequest(samples=1000, epochs=2.5))
    assert result.run is not None and result.time is not None
    assert result.run.tokens == 2500 * 2048
    assert result.run.steps == 157  # 2,500 sequences by 16, rounded up
    assert result.run.hours.value == pytest.approx(157 * result.time.step_seconds.value / 3600)
    assert result.run.gpu_hours.value == pytest.approx(8 * result.run.hours.value)


def test_a_price_that_is_given_replaces_the_catalogs() -> None:
    request = RunRequest(dataset_tokens=10**9, price_usd_per_gpu_hour=2.0)
    run = estimate(Setup(model="8e9", **H100), request=request).run
    assert run is not None and run.cost_usd is not None
    assert run.cost_usd.value == pytest.approx(2 * run.gpu_hours.value)
    assert run.price_source == "given"


def test_the_catalogs_price_lies_between_the_cheapest_and_the_dearest_provider() -> None:
    price = catalog_price("H100-SXM-80GB")
    assert price is not None
    assert price.usd_per_gpu_hour.low <= price.usd_per_gpu_hour.value <= price.usd_per_gpu_hour.high
    assert "median of" in price.source


def test_an_accelerator_without_a_price_has_no_cost_and_no_guess() -> None:
    assert catalog_price("V100-PCIE-32GB") is None
    run = estimate(
        Setup(model="1e9", precision="fp16-mixed", accelerator="V100-PCIE-32GB"), request=RunRequest(samples=10)
    ).run
    assert run is not None and run.cost_usd is None


@pytest.mark.parametrize(
    "values",
    [{"samples": 1, "dataset_tokens": 1}, {"samples": 0}, {"epochs": -1.0}, {"epochs": float("nan")}, {"epochs": float("inf")},
     {"price_usd_per_gpu_hour": -1.0}, {"reserve_bytes": -1}, {"host_memory_bytes": 0},
     {"kept_checkpoints": 0}],
    ids=str,
)  # fmt: skip
def test_a_run_that_means_nothing_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError):
        RunRequest(**values)  # type: ignore[arg-type]
