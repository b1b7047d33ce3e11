"""An estimate with a dry run made up of round numbers, so that what its page must say is known beforehand."""

from __future__ import annotations

import dataclasses

from estimator.dryrun.result import DryHolder, DryPhase, DryRun, TimelinePoint
from estimator.remedies import Remedy
from estimator.result import Estimate, FitEstimate
from estimator.units import GIB, MIB, Interval

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "logits")


def dry_run() -> DryRun:
    """Three GiB that stay, activations that rise to four and fall again, one of logits: a peak of eight in the loss."""

    def point(event: int, phase: str, activations: float, logits: float, gradients: float) -> TimelinePoint:
        amounts = tuple(round(part * GIB) for part in (1, gradients, 2, activations, logits))
        return TimelinePoint(event=event, phase=phase, bytes_by_category=amounts, reserved_bytes=9 * GIB)

    rising = [point(100 + i, "forward", i * 4 / 400, 0, 0) for i in range(400)]
    loss = [point(500, "loss", 4, 0.5, 0), point(501, "loss", 4, 1, 0)]
    falling = [point(502 + i, "backward", 4 - i * 4 / 400, 0, i / 400) for i in range(400)]
    return DryRun(
        peak_allocated_bytes=8 * GIB,
        peak_reserved_bytes=9 * GIB,
        peak_phase="forward",
        categories_bytes=(("parameters", GIB), ("optimizer", 2 * GIB), ("activations", 4 * GIB), ("logits", GIB)),
        phases=(
            DryPhase(phase="load", peak_allocated_bytes=GIB),
            DryPhase(phase="forward", peak_allocated_bytes=8 * GIB),
            DryPhase(phase="backward", peak_allocated_bytes=7 * GIB),
        ),
        holders=(
            DryHolder(module="model.layers.*.mlp.up_proj", category="activations", bytes=3 * GIB, layers=12),
            DryHolder(module="model.layers.*.mlp.up_proj", category="optimizer", bytes=2 * GIB, layers=12),
            DryHolder(module="model.layers.*.mlp.act_fn", category="activations", bytes=GIB, layers=12),
            DryHolder(module="model.embed_tokens", category="parameters", bytes=GIB, layers=0),
            DryHolder(module="", category="logits", bytes=GIB - MIB, layers=0),
            DryHolder(module="lm_head", category="logits", bytes=MIB, layers=0),
        ),
        timeline=(*rising, *loss, *falling, point(902, "optimizer", 0, 0, 1)),
        categories=CATEGORIES,
        peak_event=501,
        retries=0,
        out_of_memory=None,
        layers_run=5,
    )


REMEDIES = (
    Remedy(
        change=(("checkpointing", "full"),), flags="--checkpointing full", peak_device_bytes=6 * GIB,
        saved_bytes=4 * GIB, slower=1.3, fits=True, note="",
    ),
    Remedy(
        change=(("method", "lora"),), flags="--method lora", peak_device_bytes=5 * GIB, saved_bytes=5 * GIB, slower=0.5,
        fits=True, note="trains adapters only",
    ),
    Remedy(
        change=(("optimizer", "adamw-paged"),), flags="--optimizer adamw-paged", peak_device_bytes=9 * GIB,
        saved_bytes=GIB, slower=None, fits=False, note="",
    ),
)  # fmt: skip


def dry_estimate(estimate: Estimate, *, name: str = "a-model", capacity_bytes: int | None = 8 * GIB) -> Estimate:
    """The estimate with that dry run's memory, on a device of this capacity, and remedies."""
    margin = None if capacity_bytes is None else capacity_bytes - 10 * GIB
    return dataclasses.replace(
        estimate,
        model=dataclasses.replace(estimate.model, name=name, inferred=False, layers=12),
        memory=dataclasses.replace(
            estimate.memory, method="dry-run", dry_run=dry_run(), peak_device_bytes=Interval.exactly(10 * GIB)
        ),
        fits=FitEstimate(
            gpu="RTX-3090",
            capacity_bytes=capacity_bytes,
            fits=None if margin is None else margin >= 0,
            margin_bytes=margin,
        ),
        remedies=REMEDIES,
    )
