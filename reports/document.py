"""The JSON document of an estimate (schema ``vramcalc/estimate/1``): base units, unscaled, for other programs.

Every section and key is always there; what is unknown is null. Uncertain values are ``{"value", "low", "high"}``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from estimator.memory.host import HostMemory
from estimator.result import CheckpointEstimate, Estimate, FitEstimate, MemoryEstimate, Part, RunEstimate, TimeEstimate
from estimator.units import Interval

SCHEMA = "vramcalc/estimate/1"
# The parts that readers may rely on: one that holds nothing at the peak is a 0, not a missing key.
_MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "workspace", "communication")


def estimate_document(estimate: Estimate) -> dict[str, Any]:
    """The document as plain dicts, lists and numbers. ``parts_bytes`` sum exactly to the allocated peak."""
    return {
        "schema": SCHEMA,
        "setup": estimate.setup.as_dict(),
        "model": dataclasses.asdict(estimate.model),
        "memory": _memory(estimate.memory),
        "fits": _fit(estimate.fits),
        "fits_on": [_fit(fit) for fit in estimate.fits_on],
        "remedies": [dataclasses.asdict(remedy) | {"change": dict(remedy.change)} for remedy in estimate.remedies],
        "time": _time(estimate.time),
        "checkpoint": _checkpoint(estimate.checkpoint),
        "run": _run(estimate.run),
        "budget": None if estimate.budget is None else dataclasses.asdict(estimate.budget),
        "naive": dataclasses.asdict(estimate.naive),
        "calibration": estimate.calibration,
        "notes": list(estimate.notes),
    }


def render_json(document: Mapping[str, Any]) -> str:
    """The document as indented JSON with a newline at the end; NaN and infinity are refused, JSON has none."""
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _interval(interval: Interval | None) -> dict[str, float] | None:
    if interval is None:
        return None
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _bytes(interval: Interval) -> dict[str, float]:
    """Whole bytes: the bounds are rounded outwards."""
    return {"value": round(interval.value), "low": math.floor(interval.low), "high": math.ceil(interval.high)}


def _memory(memory: MemoryEstimate) -> dict[str, Any]:
    parts = dict.fromkeys(_MEMORY_PARTS, 0)
    for part in memory.parts:
        amount = int(part.amount)
        assert amount == part.amount, part
        parts[part.name] = parts.get(part.name, 0) + amount
    assert sum(parts.values()) == memory.peak_allocated_bytes.value, (parts, memory.peak_allocated_bytes)
    return {
        "method": memory.method,
        "phase": memory.phase,
        "parts_bytes": parts,
        "peak_allocated_bytes": _bytes(memory.peak_allocated_bytes),
        "peak_reserved_bytes": _bytes(memory.peak_reserved_bytes),
        "peak_device_bytes": _bytes(memory.peak_device_bytes),
        "peak_host_bytes": _bytes(memory.peak_host_bytes),
        "host": _host(memory.host),
        "parts": [_part(part) for part in memory.parts],
        "holders": [dataclasses.asdict(holder) for holder in memory.dry_run.holders] if memory.dry_run else None,
    }


def _host(host: HostMemory | None) -> dict[str, Any] | None:
    """By rank, in bytes without what a process has by itself."""
    if host is None:
        return None
    moment = dataclasses.asdict(host.moment)
    return {"processes": host.processes} | {k: v if k == "phase" else round(v) for k, v in moment.items()}


def _part(part: Part) -> dict[str, Any]:
    return dataclasses.asdict(part)


def _fit(fit: FitEstimate) -> dict[str, Any]:
    return dataclasses.asdict(fit)


def _time(time: TimeEstimate | None) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    for part in time.parts if time else ():
        seconds[part.name] = seconds.get(part.name, 0.0) + part.amount
    return {
        "step_seconds": _interval(time.step_seconds) if time else None,
        "tokens_per_second": _interval(time.tokens_per_second) if time else None,
        "tokens_per_second_per_gpu": _interval(time.tokens_per_second_per_gpu) if time else None,
        "model_flops_per_step": time.model_flops_per_step if time else None,
        "mfu": _interval(time.mfu) if time else None,
        "parts_seconds": seconds if time else None,
        "method": time.method if time else None,
        "parts": [_part(part) for part in time.parts] if time else None,
    }


def _checkpoint(checkpoint: CheckpointEstimate) -> dict[str, int]:
    return dataclasses.asdict(checkpoint)


def _run(run: RunEstimate | None) -> dict[str, Any]:
    return {
        "steps": run.steps if run else None,
        "tokens": run.tokens if run else None,
        "epochs": run.epochs if run else None,
        "hours": _interval(run.hours) if run else None,
        "gpu_hours": _interval(run.gpu_hours) if run else None,
        "cost_usd": _interval(run.cost_usd) if run else None,
        "energy_kwh": _interval(run.energy_kwh) if run else None,
        "price_usd_per_gpu_hour": run.price_usd_per_gpu_hour if run else None,
        "price_source": run.price_source if run else None,
        "parts_hours": {part.name: part.amount for part in run.parts} if run else None,
        "training_hours": _interval(run.training_hours) if run else None,
        "goodput": _interval(run.goodput) if run else None,
        "restarts": _interval(run.restarts) if run else None,
        "evaluations": run.evaluations if run else None,
        "checkpoints": run.checkpoints if run else None,
        "save_every_steps": run.save_every_steps if run else None,
        "checkpoint_written_bytes": run.checkpoint_written_bytes if run else None,
        "power_watts": run.power_watts if run else None,
        "power_source": run.power_source if run else None,
        "co2_kg": _interval(run.co2_kg) if run else None,
        "grid_gco2_per_kwh": run.grid_gco2_per_kwh if run else None,
        "grid_source": run.grid_source if run else None,
        "parts": [_part(part) for part in run.parts] if run else None,
    }
