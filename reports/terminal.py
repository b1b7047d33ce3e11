"""An estimate, measured runs and comparisons on a terminal: 60 columns are enough, and a pipe gets plain text.

``vramcalc estimate`` must answer at once, so it writes aligned lines to a ``Screen``; rich's tables serve the other two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from reports import scale
from reports.memory import print_holders, print_remedies
from reports.page import Page
from reports.run import print_budget, print_run
from reports.runs import printable, setting_text, varied_settings
from reports.screen import Screen

if TYPE_CHECKING:  # each dataclass costs time to load, and `estimate` has it measured
    from rich.console import Console

    from estimator.measured import MeasuredRun
    from estimator.result import (
        Estimate,
        FitEstimate,
        MemoryEstimate,
        NaiveEstimate,
        TimeEstimate,
    )
    from estimator.setup import Setup
    from reports.comparison import Comparison

_METHODS = {
    "formula": "closed formula, nothing was run",
    "dry-run": "dry run of the real model code on fake tensors",
    "measured": "formula with coefficients fitted to measured runs",
}


def print_estimate(screen: Screen, estimate: Estimate) -> None:
    """The whole estimate, section by section."""
    page = Page(screen)
    _print_what(page, estimate)
    _print_memory(page, estimate.memory)
    if estimate.memory.dry_run is not None:
        print_holders(page, estimate.memory.dry_run.holders)
    _print_fits(page, estimate.fits, estimate.fits_on)
    if estimate.remedies:
        print_remedies(page, estimate.remedies)
    if estimate.time is not None:
        _print_time(page, estimate.time)
    _print_disk(page, estimate)
    if estimate.run is not None:
        print_run(page, estimate.run, estimate.setup)
    if estimate.budget is not None:
        print_budget(page, estimate.budget, estimate.setup)
    _print_naive(page, estimate.naive, estimate)
    if estimate.notes:
        page.heading("Assumed")
        for note in estimate.notes:
            page.paragraph(note, bullet="- ")


def describe_setup(setup: Setup) -> str:
    """One line that says what a step is: "bf16-mixed, adamw-fused, 1 x 8,192 tokens a device, on 8 x h100-sxm-80gb"."""
    parts = [setup.precision + (f" under {setup.autocast} autocast" if setup.autocast else "")]
    if setup.optimizer:
        parts.append(setup.optimizer)
    if setup.checkpointing != "none":
        parts.append(f"{setup.checkpointing} checkpointing")
    if setup.sharding not in (None, "none"):
        parts.append(str(setup.sharding))
    degrees = (
        ("tensor", setup.tensor_parallel),
        ("pipeline", setup.pipeline_parallel),
        ("context", setup.context_parallel),
    )
    parts += [f"{name} parallel {ranks}" for name, ranks in (*degrees, ("expert", setup.expert_parallel)) if ranks > 1]
    if setup.offload:
        parts.append(f"{setup.offload} offloaded")
    accumulated = f" x {setup.accumulation} micro-batches" if setup.accumulation > 1 else ""
    most = "at most " if setup.varying_lengths else ""
    padded = "" if setup.pack else ", padded"
    device = " a device" * (setup.accelerators > 1)
    parts.append(f"batch {setup.batch} x {most}{setup.seq:,} tokens{accumulated}{device}{padded}")
    where = setup.accelerator or ("an accelerator" if setup.accelerators == 1 else "accelerators")
    parts.append(f"on {where}" if setup.accelerators == 1 else f"on {setup.accelerators:,} x {where}")
    return ", ".join(parts)


def describe_method(setup: Setup) -> str:
    """What is done: "Full fine-tune", "LoRA fine-tune (rank 16, nf4)"."""
    if setup.method == "full":
        return "Full fine-tune"
    if setup.method == "freeze":
        return f"Fine-tune of the last {setup.trainable_layers} layers"
    if setup.lora_rank is None:
        return "LLaMA-Adapter fine-tune" + (" (second version)" if setup.method == "adapter_v2" else "")
    names = {"lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA"}
    base = f", {setup.base_quantization}" if setup.base_quantization else ""
    return f"{names[setup.method]} fine-tune (rank {setup.lora_rank}{base})"


def _print_what(page: Page, estimate: Estimate) -> None:
    model, setup = estimate.model, estimate.setup
    trained = ""
    if model.trainable_parameters != model.parameters:
        trained = f" ({scale.count_text(model.trainable_parameters)} trained)"
    count = scale.count_text(model.parameters)
    name = f"a model of {count}" if model.inferred else model.name
    page.heading(f"{describe_method(setup)} of {name}")
    inferred = ", shape inferred from the count" if model.inferred else ""
    page.paragraph(f"{count} parameters{trained}{inferred}; {describe_setup(setup)}")


def _print_memory(page: Page, memory: MemoryEstimate) -> None:
    total = memory.peak_allocated_bytes.value
    page.heading("Memory by part", f"at the peak, in {memory.phase}")
    for part in sorted(memory.parts, key=lambda part: -part.amount):
        share = part.amount / total if total else 0.0
        bar = page.bar(share, page.width - 42)
        # A share that would read "0.0 GiB" is written in its own unit.
        like = total if share >= 0.001 else None
        page.row(part.name, scale.memory_text(part.amount, like=like), f"{share:4.0%} {bar}")
    page.row("together", scale.memory_text(total, like=total))
    page.heading("Peak memory of a device", "with 90% intervals")
    page.interval("allocated", memory.peak_allocated_bytes, "bytes")
    page.interval("reserved", memory.peak_reserved_bytes, "bytes")
    page.interval("device", memory.peak_device_bytes, "bytes", "must fit", "bold")
    page.interval("host", memory.peak_host_bytes, "bytes")
    page.paragraph(f"From: {_METHODS.get(memory.method, memory.method)}.")


def _print_fits(page: Page, fit: FitEstimate, fits_on: Sequence[FitEstimate]) -> None:
    if fit.fits is None and not fits_on:
        return
    page.heading("Does it fit?")
    if fit.fits is not None and fit.margin_bytes is not None and fit.capacity_bytes is not None:
        verdict = f"{'yes' if fit.fits else 'NO'}, {scale.margin_text(fit.margin_bytes, fits=fit.fits)}"
        capacity = scale.memory_text(fit.capacity_bytes)
        line = f"  {fit.gpu or 'device'}: {verdict} ({capacity} usable)"
        page.line(line, "bold green" if fit.fits else "bold red")
    elif fit.gpu:
        page.paragraph(f"The memory of {fit.gpu} is not known.")
    if fits_on:
        fitting = [other.gpu for other in fits_on if other.fits and other.gpu]
        if fitting:
            more = f" and {len(fitting) - 6} more" if len(fitting) > 6 else ""
            page.paragraph(f"Fits on {len(fitting)} of {len(fits_on)} known: {', '.join(fitting[:6])}{more}.")
        else:
            page.paragraph(f"Fits on none of {len(fits_on)} known accelerators.")


def _print_time(page: Page, time: TimeEstimate) -> None:
    page.heading("Speed", "with 90% intervals")
    page.interval("step", time.step_seconds, "seconds")
    page.interval("throughput", time.tokens_per_second, "tokens/s")
    if time.tokens_per_second_per_gpu != time.tokens_per_second:
        page.interval("each device", time.tokens_per_second_per_gpu, "tokens/s")
    if time.mfu is not None:
        page.interval("MFU", time.mfu, "fraction")
    page.row("model FLOPs", scale.flops_text(time.model_flops_per_step), "a step")
    page.paragraph(f"From: {_METHODS.get(time.method, time.method)}.")


def _print_disk(page: Page, estimate: Estimate) -> None:
    checkpoint = estimate.checkpoint
    page.heading("Disk")
    model, optimizer = scale.disk_text(checkpoint.model_bytes), scale.disk_text(checkpoint.optimizer_bytes)
    page.row("a checkpoint", scale.disk_text(checkpoint.bytes), f"model {model}, optimizer {optimizer}")
    page.row("the run", scale.disk_text(checkpoint.run_disk_bytes), "at its most")


def _print_naive(page: Page, naive: NaiveEstimate, estimate: Estimate) -> None:
    page.heading("The straight proportion", "how not to do it")
    right = scale.memory_text(estimate.memory.peak_device_bytes.value)
    page.row("memory", scale.memory_text(naive.vram_bytes), f"instead of {right}")
    if naive.years is not None:
        instead = ""
        if estimate.run is not None:
            instead = f"instead of {scale.seconds_text(estimate.run.hours.value * 3600)}"
        page.row("time", scale.seconds_text(naive.years * 365.25 * 86400), instead)
    base = naive.base
    described = [str(base[key]) for key in ("model", "source") if base.get(key)]
    if described:
        page.paragraph(f"Scaled from {', '.join(described)}.")
    page.paragraph(f"Why it is wrong: {naive.reason.rstrip('.')}.")


def print_runs(console: Console, runs: Iterable[MeasuredRun]) -> None:
    """A table of measured runs: what was run, peaks, step time, checkpoint, or why there is none."""
    from rich.table import Table
    from rich.text import Text

    runs = list(runs)
    varied = varied_settings(runs)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1), collapse_padding=True)
    table.add_column("model", overflow="fold", min_width=5)
    for name in varied:
        table.add_column(name.replace("_", " "), overflow="fold")
    for name in ("batch", "seq", "allocated", "device", "step", "saved"):
        table.add_column(name, justify="right", no_wrap=True)
    failures: list[str] = []
    for run in runs:
        setup = run.setup
        start = [setup.model, *(setting_text(getattr(setup, name)) for name in varied)]
        start += [str(setup.batch), f"{setup.seq:,}"]
        if run.outcome == "ok":
            rest = [
                _optional(run.peak_allocated_bytes, "bytes"),
                _optional(run.peak_device_bytes, "bytes"),
                _optional(run.step_seconds, "seconds"),
                _optional(run.checkpoint_bytes, "disk_bytes"),
            ]
        else:
            rest = [run.outcome, "", "", ""]
            failures.append(
                f"{setup.model}, batch {setup.batch} x {setup.seq:,}: {run.outcome}: {run.reason or 'no reason given'}"
            )
        table.add_row(*(Text(printable(value)) for value in start + rest))
    console.print(table)
    page = Page(Screen(console.file, width=console.width, colour=console.is_terminal and not console.no_color))
    for failure in failures:
        page.paragraph(failure, indent="", bullet="- ")


def print_comparison(console: Console, rows: Iterable[Comparison]) -> None:
    """Predicted against measured, with the error and whether the 90% interval held."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("quantity", overflow="fold")
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("in interval", justify="right")
    for row in rows:
        table.add_row(
            Text(printable(row.quantity)),
            _optional(row.predicted, row.unit),
            _optional(row.measured, row.unit),
            "-" if row.error is None else scale.percent_text(row.error, sign=True),
            {True: "yes", False: "no", None: "-"}[row.within],
        )
    console.print(table)


def _optional(value: float | None, unit: str) -> str:
    return "-" if value is None else scale.value_text(value, unit)
