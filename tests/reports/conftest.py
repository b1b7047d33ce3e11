"""An estimate, runs, laws and a training made up of round numbers, so that what a report must say is known beforehand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest

from estimator.calibration.fitting import Calibration, Coefficient, Dropped, HeldOut, Law, Range
from estimator.measured import MeasuredRun
from estimator.result import (
    CheckpointEstimate,
    Estimate,
    FitEstimate,
    MemoryEstimate,
    ModelSummary,
    NaiveEstimate,
    Part,
    RunEstimate,
    TimeEstimate,
)
from estimator.score import Score
from estimator.setup import Setup
from estimator.units import GIB, Interval
from reports.comparison import Comparison
from reports.training import LossPoint, Training

SIZES = {"nano": 1_000_000, "micro": 5_000_000, "mini": 20_000_000, "small": 60_000_000}


def _parameters(model: str) -> int:
    return SIZES.get(model) or round(float(model))


def make_estimate(setup: Setup) -> Estimate:
    """16 bytes a parameter, 2 kB a token and layer-ish; 6N FLOPs at 50 GFLOP/s; 12 bytes a parameter on the disk."""
    count = _parameters(setup.model)
    tokens = setup.batch * setup.seq
    amounts = {
        "parameters": 4 * count,
        "gradients": 4 * count,
        "optimizer": 8 * count,
        "activations": round(60 * tokens * math.sqrt(count)),
        "logits": 32_000 * tokens,
    }
    parts = tuple(
        Part(name=name, amount=amount, formula=f"formula of {name}", source="a test")
        for name, amount in amounts.items()
    )
    peak = sum(amounts.values())
    seconds = 0.004 + 6 * count * tokens / 50e9

    def near(value: float, width: float = 0.05) -> Interval:
        return Interval.within(value, below=width, above=width * 1.5)

    def fit(gpu: str, gib: float) -> FitEstimate:
        capacity = round(gib * GIB)
        return FitEstimate(gpu=gpu, capacity_bytes=capacity, fits=peak < capacity, margin_bytes=capacity - peak)

    return Estimate(
        setup=setup.resolved(),
        model=ModelSummary(
            name=setup.model, parameters=count, trainable_parameters=count, active_parameters=count, layers=12,
            hidden=512, vocab=8192, inferred=setup.model not in SIZES,
        ),
        memory=MemoryEstimate(
            method="measured", phase="backward", parts=parts, peak_allocated_bytes=near(peak),
            peak_reserved_bytes=near(peak * 1.1), peak_device_bytes=near(peak * 1.2 + 3e8), peak_host_bytes=near(2e9, 0.3),
        ),
        fits=fit("rtx-3090", 23.7),
        fits_on=(fit("rtx-3090", 23.7), fit("a100-80gb", 79.2), fit("h200", 139.7)),
        time=TimeEstimate(
            step_seconds=near(seconds, 0.15), tokens_per_second=near(tokens / seconds, 0.15),
            tokens_per_second_per_gpu=near(tokens / seconds, 0.15), model_flops_per_step=6.0 * count * tokens,
            mfu=near(0.4), parts=(Part(name="matmul", amount=seconds, formula="6 N tokens / rate", source="a test"),),
            method="measured",
        ),
        checkpoint=CheckpointEstimate(
            bytes=12 * count, model_bytes=4 * count, optimizer_bytes=8 * count, run_disk_bytes=28 * count
        ),
        run=RunEstimate(
            steps=1000, tokens=1000 * tokens, epochs=2.0, hours=near(seconds / 3.6), gpu_hours=near(seconds / 3.6),
            cost_usd=near(12.5), energy_kwh=near(3.0), price_usd_per_gpu_hour=2.5, price_source="a price list",
        ),
        naive=NaiveEstimate(
            base={"model": "qwen1.5-0.5b", "vram_bytes": 24.0 * GIB, "source": "a small run"},
            vram_bytes=38400.0 * GIB, years=32106.0, reason="States do not grow with the tokens.",
        ),
        calibration="calibration.json",
        notes=("sequences are packed", f"extrapolated: {count:.3g} parameters"),
    )  # fmt: skip


def _runs() -> list[MeasuredRun]:
    """20 runs of three models, then two of a fourth that no law has seen, one out of memory and one that hung."""
    runs = []
    grid = [(model, batch, seq) for model in ("nano", "micro", "mini") for batch in (1, 4) for seq in (64, 128, 256)]
    grid += [("micro", 2, 128), ("micro", 8, 128), ("small", 1, 128), ("small", 4, 128)]
    for number, (model, batch, seq) in enumerate(grid):
        setup = Setup(model=model, batch=batch, seq=seq, precision="fp32", accelerator="cpu")
        estimate = make_estimate(setup)
        assert estimate.time is not None
        off = 1 + 0.02 * math.sin(7 * number)
        seconds = estimate.time.step_seconds.value * (1 + 0.08 * math.cos(5 * number))
        peak = round(estimate.memory.peak_allocated_bytes.value * off)
        runs.append(
            MeasuredRun(
                run=f"{model}-{batch}-{seq}", setup=setup, source="vramcalc profile: test", parameters=SIZES[model],
                trainable_parameters=SIZES[model], peak_allocated_bytes=peak, peak_device_bytes=round(peak * 1.25 + 3e8),
                peak_phase="backward", step_seconds=seconds, step_seconds_spread=0.03, timed_steps=5,
                tokens_per_second_per_accelerator=batch * seq / seconds, checkpoint_bytes=12 * SIZES[model] + 20_000,
                torch="2.13.0", transformers="5.23.0",
                environment=json.dumps({"host": {"cores": 2}, "libraries": {"torch": "2.13.0"}}),
            )
        )  # fmt: skip
    large = Setup(model="small", batch=64, seq=256, precision="fp32", accelerator="cpu")
    runs.append(MeasuredRun(run="big", setup=large, outcome="oom", reason="not enough memory: 24 GiB asked for"))
    hung = dataclasses.replace(large, batch=32)
    runs.append(MeasuredRun(run="hung", setup=hung, outcome="timeout", reason="no step ended within 120 s"))
    return runs


def _law(quantity: str, largest: float, coefficients: list[tuple[str, str, float]], held: float) -> Law:
    return Law(
        quantity=quantity,
        coefficients=tuple(
            Coefficient(name=name, unit=unit, value=value, low=value * 0.9, high=value * 1.1)
            for name, unit, value in coefficients
        ),
        draws=(tuple(value for _, _, value in coefficients),),
        runs=20,
        residual=0.02,
        drift=0.01,
        largest=largest,
        held_out=HeldOut(
            what="the largest model (mini)", runs=("mini-1-64",), fitted_runs=14, reach=3.9,
            score=Score(n=6, median_ape=held, p90_ape=held * 2, p95_ape=held * 2, max_ape=held * 2.5, bias=-held, coverage_90=1.0),
        ),
    )  # fmt: skip


def _calibration(runs: list[MeasuredRun]) -> Calibration:
    return Calibration(
        accelerator="cpu",
        device="Test processor, 2 cores",
        environment=None,
        created="2026-01-01T00:00:00Z",
        runs=tuple(run.run for run in runs if run.setup.model != "small"),
        dropped=(Dropped(run="big", quantity="all", reason="outcome is oom"),),
        range=Range(
            parameters_low=1_000_000, parameters_high=20_000_000, tokens_low=64, tokens_high=1024,
            models=("nano", "micro", "mini"), precisions=("fp32",), methods=("full",), frameworks=("hf-trainer",),
            optimizers=("adamw-fused",), checkpointings=("none",), attentions=("sdpa",),
        ),
        memory=_law("peak_allocated_bytes", 1e9, [("states", "bytes per byte", 1.01), ("constant", "bytes", 3e6)], 0.012),
        reserved=None,
        device_memory=_law("peak_device_bytes", 2e9, [("constant", "bytes", 3e8), ("ratio", "bytes per byte", 1.2)], 0.03),
        time=_law(
            "step_seconds", 3.0,
            [("matmul_flops[fp32]", "seconds per FLOP", 2e-11), ("logits_bytes", "seconds per byte", 1e-10), ("step", "seconds", 0.004)],
            0.09,
        ),
        checkpoint=_law("checkpoint_bytes", 3e8, [("constant", "bytes", 2e4), ("ratio", "bytes per byte", 1.0)], 0.0004),
    )  # fmt: skip


def _training() -> Training:
    steps = range(1, 241)
    return Training(
        name="demo/train",
        train=tuple(LossPoint(step=step, epoch=step / 40, loss=2.2 + 5 * math.exp(-step / 30) - step / 400 + 0.06 * math.sin(2.4 * step)) for step in steps),
        evaluation=tuple(LossPoint(step=40 * epoch, epoch=float(epoch), loss=loss) for epoch, loss in enumerate((3.6, 2.71, 2.74, 2.83, 2.95, 3.1), start=1)),
        overfit_epoch=2.0,
        comparisons=(
            Comparison(quantity="peak allocated", unit="bytes", predicted=1e9, low=9e8, high=1.1e9, measured=1.02e9),
            Comparison(quantity="step time", unit="seconds", predicted=None, low=None, high=None, measured=0.5),
        ),
    )  # fmt: skip


@pytest.fixture(scope="session")
def estimate_of() -> Callable[[Setup], Estimate]:
    return make_estimate


@pytest.fixture(scope="session")
def estimate() -> Estimate:
    return make_estimate(Setup(model="8e9", accelerator="rtx-3090", seq=8192))


@pytest.fixture(scope="session")
def runs() -> list[MeasuredRun]:
    return _runs()


@pytest.fixture(scope="session")
def calibration(runs: list[MeasuredRun]) -> Calibration:
    return _calibration(runs)


@pytest.fixture(scope="session")
def training() -> Training:
    return _training()
