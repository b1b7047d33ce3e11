"""Plans on a terminal and as JSON: the front of time against money, and the largest batch and sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from estimator.hardware import Accelerator, find_accelerator
from reports import scale
from reports.document import estimate_document
from reports.page import Page
from reports.screen import Screen
from reports.terminal import describe_method, describe_setup

if TYPE_CHECKING:
    from estimator.planning.largest import Largest
    from estimator.planning.search import Limits, Plans
    from estimator.result import Estimate
    from estimator.run.cost import RunRequest
    from estimator.setup import Setup

SCHEMA = "vramcalc/plan/1"
Command = Callable[["Setup", list[str]], str]
"""The command that trains a setup with some data flags."""


def plans_document(plans: Plans, most: Largest, request: RunRequest, command: Command) -> dict[str, Any]:
    """The JSON document: base units, sections of a plan as in an estimate's."""
    return {
        "schema": SCHEMA,
        "plans": [_plan(found, command(found.setup, data_flags(request, found))) for found in plans.front],
        "largest": {
            "batch": most.batch,
            "seq": most.seq,
            "batch_setup": None if most.batch_setup is None else most.batch_setup.as_dict(),
            "seq_setup": None if most.seq_setup is None else most.seq_setup.as_dict(),
        },
        "searched": plans.searched,
        "fitting": plans.fitting,
        "left_out": list(plans.left_out),
        "misses": [{"bytes": miss.bytes, "setup": miss.setup.as_dict()} for miss in plans.misses],
    }


def _plan(estimate: Estimate, command: str) -> dict[str, Any]:
    whole = estimate_document(estimate)
    return {name: whole[name] for name in ("setup", "memory", "fits", "time", "run")} | {"command": command}


def data_flags(request: RunRequest, found: Estimate) -> list[str]:
    """How much is trained, as ``train`` takes it: whole epochs, or steps."""
    flags = []
    for flag, value in (("--dataset-tokens", request.dataset_tokens), ("--samples", request.samples)):
        if value is not None:
            flags += [flag, str(value)]
    if flags and float(request.epochs).is_integer():
        flags += ["--epochs", str(int(request.epochs))]
    elif found.run is not None:
        flags += ["--steps", str(found.run.steps)]
    return flags


def print_plans(
    screen: Screen, plans: Plans, most: Largest, request: RunRequest, limits: Limits, command: Command
) -> None:
    """Each plan in four lines, fastest first; then the largest, and what was searched."""
    page = Page(screen)
    for number, estimate in enumerate(plans.front, 1):
        _print_plan(page, number, estimate, command(estimate.setup, data_flags(request, estimate)))
    if not plans.front:
        page.heading("No plan")
        page.paragraph(_why_none(plans, limits))
    _print_largest(page, most)
    page.heading("Searched")
    page.paragraph(f"{plans.searched:,} setups, of which {plans.fitting:,} fit; each plan is cheaper than all above it")
    for miss in plans.misses:
        if plans.fitting:
            page.paragraph(
                f"{describe_method(miss.setup)} does not fit: the nearest is {scale.memory_text(miss.bytes)} too large, "
                f"{describe_setup(miss.setup)}"
            )
    for device in _of_expected_memory(plans):
        assert device.usable_bytes is not None and device.usable_low_bytes is not None
        page.paragraph(
            f"no source states what the driver of {device.name} reports: {scale.memory_text(device.usable_bytes)} expected, "
            f"of which plans count on {scale.memory_text(device.usable_low_bytes)}"
        )
    if plans.front and plans.front[0].model.inferred:
        page.paragraph(
            f"{plans.front[0].setup.model} names no model that can be trained; in a command write --model NAME"
        )
    if any(found.setup.framework != "hf-trainer" or found.setup.accelerators > 1 for found in plans.front):
        page.paragraph(
            "`vramcalc train` itself runs hf-trainer on one device; for other plans its command states the settings, "
            "which `vramcalc estimate` takes too"
        )
    if not request.tokens(1):
        page.paragraph("no data given: plans are compared by tokens; write --dataset-tokens N or --samples N")
    for reason in dict.fromkeys(plans.left_out.values()):
        names = ", ".join(name for name, why in plans.left_out.items() if why == reason)
        way = "; write --price 2.50 or --owned" if "price" in reason else ""
        page.paragraph(f"left out, {reason} known: {names}{way}")


def _of_expected_memory(plans: Plans) -> list[Accelerator]:
    names = dict.fromkeys(str(found.setup.accelerator) for found in plans.front)
    return [device for device in map(find_accelerator, names) if device.usable_is_expected]


def _why_none(plans: Plans, limits: Limits) -> str:
    if not plans.fitting:
        return "nothing fits"
    asked = [text for text, given in (("the deadline", limits.hours), ("the budget", limits.usd)) if given is not None]
    return f"{plans.fitting:,} setups fit, but none keeps {' and '.join(asked) or 'to what a dry run confirms'}"


def _print_plan(page: Page, number: int, estimate: Estimate, command: str) -> None:
    run, time, fit = estimate.run, estimate.time, estimate.fits
    assert time is not None
    page.heading(f"{number}. {_headline(estimate)}")
    page.paragraph(f"{describe_method(estimate.setup)}, {estimate.setup.framework}, {describe_setup(estimate.setup)}")
    if run is not None:
        page.interval("time", run.hours, "hours")
        if run.cost_usd is not None:
            page.interval("cost", run.cost_usd, "usd")
    page.interval("throughput", time.tokens_per_second, "tokens/s")
    if fit.margin_bytes is not None and fit.capacity_bytes:
        page.row(
            "headroom", scale.memory_text(fit.margin_bytes), f"of {scale.memory_text(fit.capacity_bytes)} a device"
        )
    page.paragraph(command, indent="  ", bullet="$ ", break_on_hyphens=False)


def _headline(estimate: Estimate) -> str:
    setup = estimate.setup
    words = f"{setup.accelerators:,} x {setup.accelerator}"
    run = estimate.run
    if run is None:
        return words
    money = "" if run.cost_usd is None else f", {scale.dollars_text(run.cost_usd.value)}"
    return f"{words}: {scale.seconds_text(run.hours.value * 3600)}{money}"


def _print_largest(page: Page, most: Largest) -> None:
    page.heading("Largest that fits")
    if most.batch is None or most.batch_setup is None:
        page.paragraph("not even one sequence")
    else:
        page.row("batch", f"{most.batch:,}", describe_setup(most.batch_setup))
    if most.seq is not None and most.seq_setup is not None:
        page.row("sequence", f"{most.seq:,}", describe_setup(most.seq_setup))
