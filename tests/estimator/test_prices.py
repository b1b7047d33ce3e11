"""Prices with source and date, and what is said where there is none."""

from __future__ import annotations

import pytest

from estimator.errors import InputError
from estimator.model.catalog import read_data
from estimator.run.prices import catalog_price, choose_price


def test_a_provider_and_spot_narrow_the_offers_down() -> None:
    rows = [r for r in read_data("prices.csv") if r["accelerator"] == "H100-SXM-80GB" and r["provider"] == "Nebius"]
    demand, spot = (
        float(next(r for r in rows if r["type"] == kind)["usd_per_gpu_hour"]) for kind in ("on-demand", "spot")
    )
    for name in ("Nebius", "nebius", "neb"):
        price = catalog_price("h100", provider=name)
        assert price is not None and price.usd_per_gpu_hour.value == demand
        assert "Nebius" in price.source and "undated" in price.source
    cheap = catalog_price("h100", provider="Nebius", spot=True)
    assert cheap is not None and cheap.usd_per_gpu_hour.value == spot < demand


def test_the_median_says_over_how_many_prices_whose_and_of_when() -> None:
    price = catalog_price("RTX-4090")
    assert price is not None and price.source == "on-demand price of RunPod, 2026-03"
    several = catalog_price("h100")
    assert several is not None and "median of" in several.source and "2024" in several.source


def test_every_price_of_the_catalog_has_a_source_and_a_date_or_says_that_it_has_none() -> None:
    for row in read_data("prices.csv"):
        assert row["source"] and row["date"], row
        assert float(row["usd_per_gpu_hour"]) > 0, row


@pytest.mark.parametrize(
    ("accelerator", "asked", "says"),
    [
        (None, {"needed": True}, "--gpu NAME"),
        ("cpu", {"needed": True}, "--price 2.50"),
        ("V100-PCIE-32GB", {"needed": True}, "no on-demand price for V100-PCIE-32GB"),
        ("V100-PCIE-32GB", {"spot": True}, "no spot price"),
        ("H100-SXM-80GB", {"provider": "nobody"}, "those who do are"),
        ("H100-SXM-80GB", {"provider": "Lambda", "spot": True}, "no spot price of Lambda"),
    ],
)
def test_an_unknown_price_that_was_asked_for_is_an_error_that_says_how_to_give_one(
    accelerator: str | None, asked: dict[str, object], says: str
) -> None:
    with pytest.raises(InputError) as error:
        choose_price(accelerator, **asked)  # type: ignore[arg-type]
    assert says in str(error.value) and "--price 2.50" in str(error.value)


def test_an_unknown_price_that_nobody_asked_for_is_none() -> None:
    assert choose_price("V100-PCIE-32GB") is None and choose_price("cpu") is None and choose_price(None) is None
    given = choose_price("V100-PCIE-32GB", given=0.5, needed=True)
    assert given is not None and given.usd_per_gpu_hour.value == 0.5
