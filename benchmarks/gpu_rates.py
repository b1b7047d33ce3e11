"""Measures how fast the kernels of a training step run on the GPU at hand, in the order of their value.

    python -m benchmarks.gpu_rates --minutes 3

Run it again to go on. Without a GPU the same kernels run in a tiny form on the CPU. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_truth import minutes, positive_count, results_directory
from benchmarks.rate_cases import Case, rate_cases
from estimator.errors import InputError
from estimator.hardware import Accelerator, accelerators
from harness.child_errors import explain_error
from profiler.device import local_device
from profiler.files import write_whole
from profiler.nvml import first_gpu
from profiler.timing import percentile

RATES = "rates.csv"
COLUMNS = (
    "kernel", "shape", "dtype", "seconds", "spread", "samples", "flops", "bytes", "flops_per_second", "bytes_per_second", "share_of_peak",
    "clock_megahertz",
)  # fmt: skip
_SAMPLES = 7
_SAMPLE_SECONDS = {"cuda": 10e-3, "cpu": 5e-4}
"""A sample repeats the kernel until it takes this long: shorter ones are all launch and clock."""
_MOST_REPEATS = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    given = _parser().parse_args(arguments)
    device = local_device()
    on_gpu = device.kind == "cuda" and not given.tiny
    out = given.out or results_directory(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"out: cannot make the directory {out}: {error.strerror or error}; write another --out"
        ) from None
    table = out / RATES
    rows = read_rates(table)
    known = {(row["kernel"], row["shape"], row["dtype"]) for row in rows}
    cases = [case for case in rate_cases(tiny=not on_gpu) if device.kind == "cuda" or not case.needs_gpu]
    accelerator = accelerators().get(device.name.lower())
    for case in cases[: given.cases]:
        if (case.kernel, case.shape, case.dtype) in known:
            continue
        if given.minutes is not None and time.monotonic() - begun > 60 * given.minutes:
            break
        row = _row(case, device.kind, accelerator)
        if row is not None:
            rows.append(row)
            write_whole(table, _csv(rows))
            print(f"{row['kernel']} {row['shape']} {row['dtype']}: {row['seconds']:.3g} s", file=sys.stderr)
    print(f"{len(rows)} of {len(cases)} kernels measured, in {table}", file=sys.stderr)
    return 0


def read_rates(table: Path) -> list[dict[str, Any]]:
    """The rows of ``rates.csv`` as text by column; none where there is no file. Raises InputError for another table."""
    if not table.exists():
        return []
    try:
        with table.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), tuple(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error):
        columns = ()
    if columns != COLUMNS:
        raise InputError(f"out: {table} is not a table of rates; write another --out")
    return rows


def _row(case: Case, kind: str, accelerator: Accelerator | None) -> dict[str, Any] | None:
    """Measures one case; ``None`` (and a line that says why) where this device cannot run it."""
    try:
        seconds = [one / case.calls for one in _measure(case.make(), kind)]
        gpu = first_gpu() if kind == "cuda" else None
        clock = None if gpu is None else gpu.clock_megahertz()
    except Exception as error:  # no memory, no such kernel: the others may still run
        print(f"{case.kernel} {case.shape} {case.dtype}: {explain_error(error)[1]}", file=sys.stderr)
        return None
    finally:
        _clean(kind)
    median = statistics.median(seconds)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "dtype": case.dtype,
        "seconds": median,
        "spread": (percentile(seconds, 0.95) - percentile(seconds, 0.05)) / 2 / median,
        "samples": len(seconds),
        "flops": round(case.flops) or "",
        "bytes": round(case.bytes) or "",
        "flops_per_second": case.flops / median if case.flops else "",
        "bytes_per_second": case.bytes / median if case.bytes else "",
        "share_of_peak": _share(case, median, accelerator),
        "clock_megahertz": clock or "",
    }


def _measure(call: Callable[[], object], kind: str) -> list[float]:
    """Seconds of one call, of each sample."""
    for _ in range(2):  # modules are loaded, workspaces taken, algorithms chosen
        call()
    once = _elapsed(call, 1, kind)
    repeats = min(max(math.ceil(_SAMPLE_SECONDS[kind] / max(once, 1e-7)), 1), _MOST_REPEATS)
    return [_elapsed(call, repeats, kind) / repeats for _ in range(_SAMPLES)]


def _elapsed(call: Callable[[], object], repeats: int, kind: str) -> float:
    if kind != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _clean(kind: str) -> None:
    gc.collect()
    if kind == "cuda":
        torch.cuda.empty_cache()


def _share(case: Case, seconds: float, accelerator: Accelerator | None) -> float | str:
    """Of the datasheet's peak: of the matrix units where FLOPs are counted, else of the link or the memory."""
    if accelerator is None:
        return ""
    if case.flops:
        peak = accelerator.tf32_flops if case.dtype == "tf32" else accelerator.matrix_flops(case.dtype)
        return case.flops / seconds / peak if peak else ""
    peak = accelerator.pcie_bytes_per_second if case.needs_gpu else accelerator.bandwidth_bytes_per_second
    return case.bytes / seconds / peak if peak and case.bytes else ""


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    return text.getvalue().encode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_rates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=minutes, help="stop after this long (default: when all is measured)")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/<accelerator>-<date>; resumes what is there"
    )
    parser.add_argument("--cases", type=positive_count, help="only the first N")
    parser.add_argument("--tiny", action="store_true", help="the CPU's form on a GPU too")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
