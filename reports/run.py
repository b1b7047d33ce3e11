"""A whole run and a budget on a screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports import scale
from reports.page import Page

if TYPE_CHECKING:
    from estimator.result import BudgetEstimate, RunEstimate
    from estimator.setup import Setup


def print_run(page: Page, run: RunEstimate, setup: Setup) -> None:
    """Steps, time with what it goes to, money with whose price, files, energy."""
    epochs = f", {scale.digits(run.epochs)} epochs" if run.epochs != 1 else ""
    page.heading("The whole run", "with 90% intervals")
    page.row("steps", f"{run.steps:,}", f"{scale.count_text(run.tokens)} tokens{epochs}")
    page.interval("duration", run.hours, "hours")
    _print_overheads(page, run)
    if setup.accelerators > 1:
        hours = run.gpu_hours
        page.row("GPU-hours", scale.digits(hours.value), f"{scale.digits(hours.low)} to {scale.digits(hours.high)}")
    if run.cost_usd is not None:
        page.interval("cost", run.cost_usd, "usd", _price_text(run.price_usd_per_gpu_hour, run.price_source))
    if run.checkpoints and run.checkpoint_written_bytes:
        written = scale.disk_text(run.checkpoint_written_bytes)
        every = "every step" if run.save_every_steps == 1 else f"every {run.save_every_steps:,} steps"
        page.row("checkpoints", f"{run.checkpoints:,}", f"{every}, {written} written")
    if run.energy_kwh is not None:
        limit = f"{scale.digits(run.power_watts)} W a device" if run.power_watts else ""
        page.interval("energy", run.energy_kwh, "kwh", limit)
    if run.co2_kg is not None and run.grid_gco2_per_kwh is not None:
        page.interval("CO2", run.co2_kg, "kg", f"at {scale.digits(run.grid_gco2_per_kwh)} g/kWh, {run.grid_source}")


def _print_overheads(page: Page, run: RunEstimate) -> None:
    """What the time goes to beside the steps, where that is worth a line."""
    shares = [
        f"{part.name} {scale.seconds_text(part.amount * 3600)}"
        for part in run.parts
        if part.name != "steps" and part.amount >= 0.001 * run.hours.value
    ]
    if shares:
        page.paragraph("of which " + ", ".join(shares), indent=" " * 6)
    if run.restarts is not None and run.restarts.value >= 0.5 and run.goodput is not None:
        low, high = scale.digits(run.restarts.low), scale.digits(run.restarts.high)
        page.row("restarts", scale.digits(run.restarts.value), f"{low} to {high}")
        page.interval("goodput", run.goodput, "fraction", "the steps' share of the time")


def _price_text(price: float | None, source: str | None) -> str:
    if price is None:
        return ""
    return f"at {scale.dollars_text(price)} an hour" + (f", {source}" if source else "")


def print_budget(page: Page, budget: BudgetEstimate, setup: Setup) -> None:
    """Tokens and epochs for the money, and how far that is from compute-optimal pretraining."""
    page.heading(f"What {scale.dollars_text(budget.budget_usd)} trains", "with 90% intervals")
    page.interval("duration", budget.hours, "hours", _price_text(budget.price_usd_per_gpu_hour, budget.price_source))
    page.interval("steps", budget.steps, "count")
    page.interval("tokens", budget.tokens, "count")
    if budget.epochs is not None:
        page.interval("epochs", budget.epochs, "", "over the data")
    if setup.method == "full":
        best = scale.count_text(budget.chinchilla_tokens)
        page.interval("of optimum", budget.chinchilla_share, "fraction", f"{best} tokens, 20 a parameter")
        size, tokens = (scale.count_text(i.value) for i in (budget.optimal_parameters, budget.optimal_tokens))
        page.paragraph(f"The same work pretrains best a dense model of {size} parameters on {tokens} tokens.")
