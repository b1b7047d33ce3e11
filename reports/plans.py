"""Plans on a terminal and as JSON: the front of time against money, and the largest batch and sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from estimator.hardware import Accelerator, find_accelerator
from estimator.run.facts import run_fact
from reports import scale
from reports.document import estimate_document
from reports.page import Page
from reports.screen import Screen
from reports.terminal import describe_method, describe_setup

if TYPE_CHECKING:
    from estimator.planning.alternatives import Alternative
    from estimator.planning.largest import Largest
    from estimator.planning.search import Limits, Plans
    from estimator.result import Estimate
    from estimator.run.cost import RunRequest
    from estimator.setup import Setup

SCHEMA = "vramcalc/plan/1"
Command = Callable[["Setup", list[str]], str]
"""The command that trains a setup with some data flags."""
_LISTED = 4
"""Plans from which on an overview comes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """All that is shown of one search."""

    plans: Plans
    largest: Largest
    alternatives: tuple[Alternative, ...]
    request: RunRequest
    limits: Limits
    command: Command
    trains: Callable[[Setup], bool]
    """Whether ``vramcalc train`` runs a setup itself."""


def plans_document(search: Search) -> dict[str, Any]:
    """The JSON document: base units, sections of a plan as in an estimate's."""
    plans, most = search.plans, search.largest
    return {
        "schema": SCHEMA,
        "plans": [_plan(search, found) for found in plans.front],
        "largest": {
            "batch": most.batch,
            "seq": most.seq,
            "batch_setup": None if most.batch_setup is None else most.batch_setup.as_dict(),
            "seq_setup": None if most.seq_setup is None else most.seq_setup.as_dict(),
        },
        "alternatives": [
            {"flags": other.flags, "note": other.note} | _plan(search, other.found) for other in search.alternatives
        ],
        "searched": plans.searched,
        "fitting": plans.fitting,
        "assumed_tokens": plans.assumed_tokens,
        "left_out": list(plans.left_out),
        "misses": [{"bytes": miss.bytes, "setup": miss.setup.as_dict()} for miss in plans.misses],
    }


def _plan(search: Search, found: Estimate) -> dict[str, Any]:
    whole = estimate_document(found)
    return {name: whole[name] for name in ("setup", "memory", "fits", "time", "run")} | {
        "command": search.command(found.setup, data_flags(search.request, found)),
        "trains": search.trains(found.setup),
    }


def data_flags(request: RunRequest, found: Estimate) -> list[str]:
    """How much is trained, as ``train`` takes it: whole epochs, or steps."""
    flags = []
    for flag, value in (("--dataset-tokens", request.dataset_tokens), ("--samples", request.samples)):
        if value is not None:
            flags += [flag, str(value)]
    if flags and float(request.epochs).is_integer():
        flags += ["--epochs", str(int(request.epochs))]
    elif flags and found.run is not None:
        flags += ["--steps", str(found.run.steps)]
    return flags


def print_plans(screen: Screen, search: Search) -> None:
    """Each plan in a few lines, fastest first; then the largest, what else would do, and what was searched."""
    page, plans = Page(screen), search.plans
    if len(plans.front) >= _LISTED:
        _print_overview(page, plans)
    for number, found in enumerate(plans.front, 1):
        _print_plan(page, number, found, search.command(found.setup, data_flags(search.request, found)))
    if not plans.front:
        page.heading("No plan")
        page.paragraph(_why_none(plans, search.limits))
    _print_alternatives(page, search)
    _print_largest(page, search.largest)
    page.heading("Searched")
    for text in _notes(search):
        page.paragraph(text)


def _print_overview(page: Page, plans: Plans) -> None:
    page.heading("Plans", "fastest first; each is cheaper than all above it")
    for number, found in enumerate(plans.front, 1):
        assert found.run is not None and found.fits.margin_bytes is not None
        money = _money(found)
        room = f"{scale.memory_text(found.fits.margin_bytes)} free"
        time = scale.seconds_text(found.run.hours.value * 3600)
        page.line(f"  {number:>2}  {_where(found.setup):<22} {time:>8} {money:>8} {room:>13}")


def _print_alternatives(page: Page, search: Search) -> None:
    if not search.alternatives:
        return
    page.heading("Cheaper, but another training" if search.plans.front else "What would do, but is another training")
    for other in search.alternatives:
        page.paragraph(
            f"{other.flags}: {_headline(other.found).replace(': ', ', ')}; {other.note}", break_on_hyphens=False
        )


def _notes(search: Search) -> Iterator[str]:
    plans = search.plans
    order = "; each plan is cheaper than all above it" if len(plans.front) > 1 else ""
    yield f"{plans.searched:,} setups, of which {plans.fitting:,} fit{order}"
    for miss in plans.misses:
        if plans.fitting:
            yield (
                f"{describe_method(miss.setup)} does not fit: the nearest is {scale.memory_text(miss.bytes)} too large, "
                f"{describe_setup(miss.setup)}"
            )
    for device in _of_expected_memory(plans):
        assert device.usable_bytes is not None and device.usable_low_bytes is not None
        yield (
            f"no source states what the driver of {device.name} reports: {scale.memory_text(device.usable_bytes)} expected, "
            f"of which plans count on {scale.memory_text(device.usable_low_bytes)}"
        )
    if plans.front and plans.front[0].model.inferred:
        yield f"{plans.front[0].setup.model} names no model that can be trained; in a command write --model NAME"
    elif plans.front:
        yield from _what_trains(search)
    if plans.assumed_tokens is not None:
        tokens = scale.count_text(plans.assumed_tokens)
        yield f"no data given: times and costs are of {tokens} tokens; write --dataset-tokens N or --samples N"
    if any(found.setup.offload for found in plans.front) and search.request.host_memory_bytes is None:
        yield (
            "a machine is taken to have "
            f"{scale.disk_text(run_fact('host_bytes_per_accelerator').value.value)} of memory for each accelerator; write "
            "--host-memory N"
        )
    for reason in dict.fromkeys(plans.left_out.values()):
        names = ", ".join(name for name, why in plans.left_out.items() if why == reason)
        way = "; write --price 2.50 or --owned" if "price" in reason else ""
        yield f"left out, {reason} known: {names}{way}"


def _what_trains(search: Search) -> Iterator[str]:
    """Which commands ``vramcalc train`` refuses, where it does not run all."""
    front = search.plans.front
    refused = [number for number, found in enumerate(front, 1) if not search.trains(found.setup)]
    if not refused:
        return
    if len(front) == 1:
        which = "does not run this plan"
    elif len(refused) == len(front):
        which = "runs none of these plans"
    else:
        which = f"does not run plan{'s' if len(refused) > 1 else ''} {_ranges(refused)}"
    yield (
        f"`vramcalc train` itself {which}: the command states the settings for the framework that is named, and "
        "`vramcalc estimate` takes them too"
    )


def _ranges(numbers: list[int]) -> str:
    """``1-3, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _of_expected_memory(plans: Plans) -> list[Accelerator]:
    names = dict.fromkeys(str(found.setup.accelerator) for found in plans.front)
    return [device for device in map(find_accelerator, names) if device.usable_is_expected]


def _why_none(plans: Plans, limits: Limits) -> str:
    if not plans.fitting:
        return "nothing fits"
    asked = [
        f"the {flag}: the {kind} {text}"
        for flag, kind, text, given in (
            ("deadline", "fastest takes", scale.seconds_text(plans.least_hours * 3600), limits.hours),
            ("budget", "cheapest costs", scale.dollars_text(plans.least_usd), limits.usd),
        )
        if given is not None
    ]
    return f"{plans.fitting:,} setups fit, but none keeps {', and '.join(asked) or 'to what a dry run confirms'}"


def _print_plan(page: Page, number: int, estimate: Estimate, command: str) -> None:
    run, time, fit = estimate.run, estimate.time, estimate.fits
    assert time is not None
    memory = estimate.memory
    page.heading(f"{number}. {_headline(estimate)}")
    page.paragraph(f"{describe_method(estimate.setup)}, {estimate.setup.framework}, {describe_setup(estimate.setup)}")
    if run is not None:
        page.interval("time", run.hours, "hours")
        if run.cost_usd is not None and run.cost_usd.value:
            page.interval("cost", run.cost_usd, "usd")
    page.interval("throughput", time.tokens_per_second, "tokens/s")
    if fit.margin_bytes is not None and fit.capacity_bytes:
        page.row(
            "headroom", scale.memory_text(fit.margin_bytes), f"of {scale.memory_text(fit.capacity_bytes)} a device"
        )
    if estimate.setup.offload:
        page.interval("host memory", memory.peak_host_bytes, "bytes", "a machine")
    page.paragraph(command, indent="  ", bullet="$ ", break_on_hyphens=False)


def _headline(estimate: Estimate) -> str:
    words, run = _where(estimate.setup), estimate.run
    if run is None:
        return words
    return f"{words}: " + ", ".join(filter(None, (scale.seconds_text(run.hours.value * 3600), _money(estimate))))


def _money(estimate: Estimate) -> str:
    """Nothing where nothing is paid."""
    cost = estimate.run.cost_usd if estimate.run else None
    return scale.dollars_text(cost.value) if cost is not None and cost.value else ""


def _where(setup: Setup) -> str:
    return f"{setup.accelerators:,} x {setup.accelerator}"


def _print_largest(page: Page, most: Largest) -> None:
    page.heading("Largest that fits")
    if most.batch is None or most.batch_setup is None:
        page.paragraph("not even one sequence")
    else:
        page.row("batch", f"{most.batch:,}", describe_setup(most.batch_setup))
    if most.seq is not None and most.seq_setup is not None:
        page.row("sequence", f"{most.seq:,}", describe_setup(most.seq_setup))
