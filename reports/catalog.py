"""The catalogs of models and accelerators, for people and programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from estimator.hardware import Accelerator
from estimator.model.shape import ModelShape, active_parameters, count_parameters
from reports.scale import count_text, flops_text, memory_text

if TYPE_CHECKING:
    from rich.console import Console


def catalog_document(shapes: Sequence[ModelShape], devices: Sequence[Accelerator]) -> dict[str, Any]:
    """For ``--json``: shapes with their parameter counts, accelerators with rates in base units."""
    return {
        "schema": "vramcalc/models/1",
        "models": [
            {
                **dataclasses.asdict(shape),
                "parameters": count_parameters(shape).total,
                "active_parameters": active_parameters(shape),
            }
            for shape in shapes
        ],
        "accelerators": [dataclasses.asdict(device) for device in devices],
    }


def print_catalog(console: Console, shapes: Sequence[ModelShape], devices: Sequence[Accelerator]) -> None:
    """One line each."""
    console.print("Models (parameters, layers x width, vocabulary)", style="bold")
    wide = max(len(shape.name) for shape in shapes)
    for shape in shapes:
        active = f", {count_text(active_parameters(shape))} active" if shape.experts else ""
        size = f"{count_text(count_parameters(shape).total)}{active}"
        console.print(
            f"  {shape.name:<{wide}}  {size}; {shape.layers} x {shape.hidden:,}; {shape.vocab:,}", markup=False
        )
    console.print("\nAccelerators (usable memory, bf16 peak)", style="bold")
    wide = max(len(device.name) for device in devices)
    for device in devices:
        memory = "memory unknown" if device.usable_bytes is None else memory_text(device.usable_bytes)
        rate = "rate unknown" if device.bf16_flops is None else f"{flops_text(device.bf16_flops)}/s"
        console.print(f"  {device.name:<{wide}}  {memory}; {rate}", markup=False)
