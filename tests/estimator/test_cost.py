"""From a step to a run, and the naive sums of the story."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.run.cost import RunRequest
from estimator.run.prices import catalog_price
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
    hours = {part.name: part.amount for part in result.run.parts}
    assert hours["steps"] == pytest.approx(157 * result.time.step_seconds.value / 3600)
    assert result.run.hours.value == pytest.approx(sum(hours.values()))
    assert result.run.training_hours == result.time.step_seconds.scaled(157 / 3600)
    assert result.run.gpu_hours.value == pytest.approx(8 * result.run.hours.value)


def test_a_price_that_is_given_replaces_the_catalogs() -> None:
    request = RunRequest(dataset_tokens=10**9, price_usd_per_gpu_hour=2.0)
    run = estimate(Setup(model="8e9", **H100), request=request).run
    assert run is not None and run.cost_usd is not None
    assert run.cost_usd.value == pytest.approx(2 * run.gpu_hours.value)
    assert run.price_source == "given"


def test_energy_and_emissions_follow_from_power_and_grid() -> None:
    request = RunRequest(dataset_tokens=10**9, grid_gco2_per_kwh=100.0)
    run = estimate(Setup(model="8e9", **H100), request=request).run
    assert run is not None and run.energy_kwh is not None and run.co2_kg is not None
    assert run.power_watts == 700  # the H100 SXM data sheet
    assert run.energy_kwh.value == pytest.approx(run.gpu_hours.value * 0.7 * 0.85 * 1.3)
    assert run.co2_kg.value == pytest.approx(run.energy_kwh.value * 0.1)
    assert run.co2_kg.high / run.co2_kg.value == pytest.approx(run.energy_kwh.high / run.energy_kwh.value)
    world = estimate(Setup(model="8e9", **H100), request=RunRequest(dataset_tokens=10**9)).run
    assert world is not None and world.grid_gco2_per_kwh == 445 and "IEA" in str(world.grid_source)


@given(st.integers(1, 10**13), st.integers(1, 10**13), st.sampled_from([1, 8, 1024, 16384]), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([None, 10, 1000]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_more_tokens_never_cost_less(one: int, other: int, devices: int, epochs: float, save_every: int | None) -> None:
    def costs(tokens: int) -> tuple[float, float, float]:
        request = RunRequest(dataset_tokens=tokens, epochs=epochs, save_every_steps=save_every, eval_samples=100)
        run = estimate(Setup(model="1e9", seq=512, accelerators=devices, **H100), request=request).run
        assert run is not None and run.cost_usd is not None
        assert sum(part.amount for part in run.parts) == pytest.approx(run.hours.value)
        return run.cost_usd.low, run.cost_usd.value, run.cost_usd.high

    few, many = sorted((one, other))
    assert all(less <= more * (1 + 1e-9) for less, more in zip(costs(few), costs(many), strict=True))


@given(st.integers(0, 13), st.sampled_from(["1e9", "8e9", "70e9"]))
@settings(max_examples=30, deadline=None)
def test_no_number_of_accelerators_beats_the_peak(doublings: int, model: str) -> None:
    setup = Setup(model=model, accelerators=2**doublings, **H100)
    result = estimate(setup, request=RunRequest(dataset_tokens=10**11))
    assert result.run is not None and result.time is not None
    peak = 989.4e12  # FLOP/s: the H100 SXM data sheet, dense bf16
    assert result.run.gpu_hours.low >= result.run.steps * result.time.model_flops_per_step / peak / 3600


def test_the_catalogs_price_lies_between_the_cheapest_and_the_dearest_provider() -> None:
    price = catalog_price("H100-SXM-80GB")
    assert price is not None
    assert price.usd_per_gpu_hour.low <= price.usd_per_gpu_hour.value <= price.usd_per_gpu_hour.high
    assert "median of" in price.source


def test_an_accelerator_without_a_price_has_no_cost_and_no_guess() -> None:
    assert catalog_price("V100-PCIE-32GB") is None
    found = estimate(
        Setup(model="1e9", precision="fp16-mixed", accelerator="V100-PCIE-32GB"), request=RunRequest(samples=10)
    )
    assert found.run is not None and found.run.cost_usd is None
    assert any("no price for V100-PCIE-32GB; write --price" in note for note in found.notes)


@pytest.mark.parametrize(
    "values",
    [{"samples": 1, "dataset_tokens": 1}, {"samples": 0}, {"epochs": -1.0}, {"epochs": float("nan")}, {"epochs": float("inf")}, {"epochs": 1e300},
     {"price_usd_per_gpu_hour": -1.0}, {"reserve_bytes": -1}, {"host_memory_bytes": 0},
     {"kept_checkpoints": 0}, {"save_every_steps": 0}, {"eval_samples": 0}, {"eval_every_steps": 5}, {"budget_usd": 0},
     {"price_usd_per_gpu_hour": 2.0, "provider": "Lambda"}, {"price_usd_per_gpu_hour": 2.0, "spot": True},
     {"disk_bytes_per_second": 0}, {"grid_gco2_per_kwh": -1.0}, {"grid_gco2_per_kwh": float("nan")}],
    ids=str,
)  # fmt: skip
def test_a_run_that_means_nothing_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError):
        RunRequest(**values)  # type: ignore[arg-type]
