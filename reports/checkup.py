"""The state of a machine, for people and programs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from profiler.checkup import Checkup
from reports.scale import disk_text, memory_text

if TYPE_CHECKING:
    from rich.console import Console


def checkup_document(state: Checkup) -> dict[str, Any]:
    """For ``--json``."""
    return {"schema": "vramcalc/doctor/1", **dataclasses.asdict(state)}


def print_checkup(console: Console, state: Checkup) -> None:
    """Versions, devices, disk, and what to do about what is missing."""
    console.print(f"vramcalc {state.toolkit}, Python {state.python}, {state.system}, {state.cores} cores", markup=False)
    console.print("\nDevices", style="bold")
    for device in state.devices:
        memory = f"{memory_text(device.free_bytes)} free of {memory_text(device.capacity_bytes)}"
        console.print(f"  {device.name:<16} {memory}  ({device.description})", markup=False)
    console.print(f"  {'disk':<16} {disk_text(state.disk_free_bytes)} free at {state.disk_path}", markup=False)
    console.print("\nPackages", style="bold")
    for package in state.packages:
        have = package.version or ("missing" if package.install else "absent")
        console.print(f"  {package.name:<16} {have:<12} {package.purpose}", markup=False)
    console.print("\nTo do" if state.problems else "\nNothing is missing.", style="bold")
    for line in state.problems:
        console.print(f"  - {line}", markup=False)
