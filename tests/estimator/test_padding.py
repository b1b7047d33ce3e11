"""Padded sequences in the estimate: their masks, against real steps on this CPU."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from estimator.dryrun.run import dry_run
from estimator.estimate import estimate
from estimator.model.catalog import resolve_model
from estimator.setup import Setup

sys.path.insert(0, str(Path(__file__).parent))
from cpu_truth import measured_peaks

PADDED = Setup(model="nano", precision="fp32", seq=256, batch=2, accelerator="cpu", pack=False, loss="fused-linear")


def test_a_real_step_of_padded_sequences_peaks_where_dry_run_and_formula_say() -> None:
    setup = PADDED.resolved()
    measured = measured_peaks(setup).allocated_bytes
    assert dry_run(setup).peak_allocated_bytes == pytest.approx(measured, rel=0.002)
    assert estimate(setup).memory.peak_allocated_bytes.value == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("changes", [{}, {"accelerator": "RTX-3090"}, {"accelerator": "RTX-3090", "batch": 1}], ids=str)
def test_each_layer_keeps_a_mask_of_every_padded_sequence(changes: dict[str, Any]) -> None:
    padded = dataclasses.replace(PADDED, model="micro", seq=1024, **changes)
    kernel = None if padded.accelerator == "cpu" else "efficient"  # which has a mask of its own
    packed = dataclasses.replace(padded, pack=True, attention_kernel=kernel)
    peak, unmasked = (estimate(setup).memory.peak_allocated_bytes.value for setup in (padded, packed))
    masks = resolve_model("micro").layers * 4 * padded.batch * 1024**2  # in fp32
    if padded.accelerator == "cpu":
        assert masks <= peak - unmasked <= 1.5 * masks  # one more is momentary
    else:
        assert peak == unmasked
    assert any(note.startswith("padded: ") for note in estimate(padded).notes)
