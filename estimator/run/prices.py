"""What an accelerator-hour costs: a price that is given, a provider's, or the catalog's median; with source and date."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from estimator.errors import InputError
from estimator.hardware import find_accelerator, is_cpu
from estimator.model.catalog import read_data
from estimator.units import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars for one accelerator-hour; the interval runs from the cheapest to the dearest offer."""

    usd_per_gpu_hour: Interval
    source: str
    """Whose offers, and of when."""


@functools.cache
def _offers(accelerator: str) -> tuple[dict[str, str], ...]:
    name = find_accelerator(accelerator).name
    return tuple(r for r in read_data("prices.csv") if r["accelerator"] == name and r["usd_per_gpu_hour"])


def catalog_price(accelerator: str, *, provider: str | None = None, spot: bool = False) -> Price | None:
    """The median offer, and the cheapest and dearest; ``None`` where nobody lists such a one.

    ``provider`` is its name or the start of it, in any case. Machines that can be taken back count only with ``spot``.
    """
    kind = "spot" if spot else "on-demand"
    offers = [
        row
        for row in _offers(accelerator)
        if kind in row["type"] and (provider is None or row["provider"].lower().startswith(provider.strip().lower()))
    ]
    if not offers:
        return None
    prices = sorted(float(row["usd_per_gpu_hour"]) for row in offers)
    middle = (prices[(len(prices) - 1) // 2] + prices[len(prices) // 2]) / 2
    names = sorted({row["provider"] for row in offers})
    whose = names[0] if len(names) == 1 else f"{len(names)} providers"
    count = f"{kind} price" if len(prices) == 1 else f"median of {len(prices)} {kind} prices"
    return Price(
        usd_per_gpu_hour=Interval(value=middle, low=prices[0], high=prices[-1]),
        source=f"{count} of {whose}, {_dates(offers)}",
    )


def choose_price(
    accelerator: str | None,
    *,
    given: float | None = None,
    provider: str | None = None,
    spot: bool = False,
    needed: bool = False,
) -> Price | None:
    """The price of a run: ``given`` before the catalog's; ``None`` where none is known and none is needed.

    Raises InputError, which says how to give one, where a provider, spot or a budget asks for a price that nobody lists.
    """
    if given is not None:
        return Price(usd_per_gpu_hour=Interval.exactly(given), source="given")
    asked = needed or provider is not None or spot
    if accelerator is None or is_cpu(accelerator):
        if asked:
            what = "no accelerator is named" if accelerator is None else "a CPU has no price in the catalog"
            raise InputError(f"price: {what}; write --gpu NAME, or dollars for one GPU-hour, --price 2.50")
        return None
    price = catalog_price(accelerator, provider=provider, spot=spot)
    if price is None and asked:
        raise InputError(_unknown(accelerator, provider, spot))
    return price


def _unknown(accelerator: str, provider: str | None, spot: bool) -> str:
    kind = "spot" if spot else "on-demand"
    listing = sorted({row["provider"] for row in _offers(accelerator) if kind in row["type"]})
    whose = f" of {provider}" if provider else ""
    known = f"those who do are {', '.join(listing)}; or " if listing and provider else ""
    return (
        f"{'provider' if provider else 'price'}: the catalog has no {kind} price{whose} for {accelerator}; "
        f"{known}write dollars for one GPU-hour, --price 2.50"
    )


def _dates(offers: Sequence[dict[str, str]]) -> str:
    """When the offers were seen: years sort as text; what carries no date says so."""
    days = [row["date"].removeprefix("mid-") for row in offers]
    dated = sorted({day for day in days if day.startswith("20")})
    undated = sum(not day.startswith("20") for day in days)
    if not dated:
        return offers[0]["date"] if len(offers) == 1 else "undated"
    span = dated[0] if len(dated) == 1 else f"{dated[0]} to {dated[-1]}"
    return f"{span}, {undated} undated" if undated else span
