"""``laws.fit`` over measured runs: the measurements are the formulas' own answers, distorted by known factors."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from estimator.calibration.applying import apply_checkpoint, apply_device, apply_memory, apply_time
from estimator.calibration.file import read_calibration, write_calibration
from estimator.calibration.laws import QUANTITIES, device_name, fit
from estimator.errors import InputError
from estimator.measured import MeasuredRun
from estimator.memory.checkpoint import checkpoint_bytes
from estimator.memory.formula import memory_phases
from estimator.model.catalog import resolve_model
from estimator.model.shape import count_parameters
from estimator.setup import Setup
from estimator.speed.compute import step_work

DRAWS = 20


def seconds(setup: Setup) -> float:
    """A machine of 60 GFLOP/s and 10 GB/s that needs 4 ms a step."""
    work = step_work(resolve_model(setup.model), setup)
    flops = work.matmul_flops + work.head_flops + work.attention_flops
    return flops / 60e9 + (work.elementwise_bytes + work.logits_bytes + work.optimizer_bytes) / 10e9 + 0.004


def measured(model: str, seq: int, batch: int, **changes: Any) -> MeasuredRun:
    """Allocated 4% above the formula, device 600 MB above that, checkpoints 20 kB above theirs."""
    setup = Setup(model=model, accelerator="cpu", precision="fp32", seq=seq, batch=batch)
    resolved, shape = setup.resolved(), resolve_model(model)
    allocated = round(1.04 * max(phase.bytes for phase in memory_phases(shape, resolved)))
    run = MeasuredRun(
        run=f"{model}-{seq}-{batch}",
        setup=setup,
        parameters=count_parameters(shape).total,
        peak_allocated_bytes=allocated,
        peak_device_bytes=600_000_000 + allocated,
        step_seconds=seconds(resolved),
        checkpoint_bytes=20_000 + sum(checkpoint_bytes(shape, resolved)),
        environment='{"device": "Test CPU", "device_kind": "cpu", "threads": 2}',
    )
    return dataclasses.replace(run, **changes)


def sweep(*models: str) -> list[MeasuredRun]:
    chosen = models or ("nano", "micro", "mini")
    return [measured(model, seq, batch) for model, seq, batch in itertools.product(chosen, (128, 256), (1, 2))]


def test_a_sweep_over_three_small_models_predicts_one_three_times_larger() -> None:
    laws = fit(sweep(), draws=DRAWS)
    truth = measured("small", 256, 2)
    setup, shape = truth.setup.resolved(), resolve_model("small")
    memory = apply_memory(laws, memory_phases(shape, setup))
    time = apply_time(laws, step_work(shape, setup), setup)
    checkpoint = apply_checkpoint(laws, *checkpoint_bytes(shape, setup))
    assert memory is not None and time is not None and checkpoint is not None
    device = apply_device(laws, memory.peak_allocated_bytes)
    assert device is not None
    assert memory.peak_allocated_bytes.value == pytest.approx(truth.peak_allocated_bytes, rel=0.02)
    assert device.value == pytest.approx(truth.peak_device_bytes, rel=0.03)
    assert time.step_seconds.value == pytest.approx(truth.step_seconds, rel=0.05)
    assert checkpoint.bytes.value == pytest.approx(truth.checkpoint_bytes, rel=0.001)


def test_the_calibration_says_what_it_rests_on(tmp_path: Path) -> None:
    laws = fit(sweep(), draws=DRAWS)
    assert (laws.accelerator, laws.device) == ("cpu", "Test CPU, 2 threads")
    assert len(laws.runs) == 12
    assert laws.range.models == ("micro", "mini", "nano")
    assert (laws.range.tokens_low, laws.range.tokens_high) == (128, 512)
    assert laws.range.parameters_high == count_parameters(resolve_model("mini")).total
    assert laws.range.optimizers == ("adamw-fused",)  # what hf-trainer uses where the setup does not say
    for law in laws.laws:
        assert law.held_out is not None and law.held_out.fitted_runs == 8, law.quantity
        assert "mini" in law.held_out.what
        assert len(law.draws) == DRAWS
    write_calibration(tmp_path / "calibration.json", laws)
    assert read_calibration(tmp_path / "calibration.json") == laws


def test_runs_that_cannot_be_used_are_dropped_with_the_reason() -> None:
    runs = [
        *sweep(),
        measured("mini", 512, 4, run="big", outcome="oom", reason="out of memory"),
        measured("mini", 512, 1, run="odd", setup=Setup(model="no-such-model", accelerator="cpu")),
        measured("mini", 512, 2, run="unsaved", checkpoint_bytes=None),
        measured("mini", 512, 2, run="parallel", setup=Setup(model="mini", accelerator="cpu", accelerators=2, precision="fp32")),
    ]  # fmt: skip
    laws = fit(runs, unreadable=[("r9", "seq: 'long' is not a number")], draws=0)
    reasons = {(drop.run, drop.quantity): drop.reason for drop in laws.dropped}
    assert reasons["big", "all"] == "the run ended as oom"
    assert "no-such-model" in reasons["odd", "all"]
    assert reasons["unsaved", "checkpoint_bytes"] == "checkpoint_bytes was not measured"
    assert "spans 2 accelerators" in reasons["parallel", "step_seconds"]
    assert reasons["r9", "all"] == "unreadable row: seq: 'long' is not a number"
    assert {"big", "odd", "r9"}.isdisjoint(laws.runs)
    assert {"unsaved", "parallel"} < set(laws.runs)


def test_a_quantity_that_no_run_states_has_no_law() -> None:
    laws = fit([dataclasses.replace(run, step_seconds=None, peak_reserved_bytes=None) for run in sweep()], draws=0)
    assert laws.time is None and laws.reserved is None
    assert laws.memory is not None and laws.checkpoint is not None


def test_a_setup_that_the_formulas_refuse_is_dropped_and_the_others_are_fitted() -> None:
    odd = Setup(model="mini", accelerator="cpu", method="lora", lora_targets="no_such_projection")
    laws = fit([*sweep(), measured("mini", 512, 1, run="odd", setup=odd)], draws=0)
    assert [drop.run for drop in laws.dropped if drop.quantity == "all"] == ["odd"]
    assert "no_such_projection" in laws.dropped[0].reason


def test_tokens_per_second_are_a_step_time_as_well() -> None:
    def as_rate(run: MeasuredRun) -> MeasuredRun:
        assert run.step_seconds is not None
        rate = run.setup.seq * run.setup.batch / run.step_seconds
        return dataclasses.replace(run, step_seconds=None, tokens_per_second_per_accelerator=rate)

    told, derived = fit(sweep(), draws=0).time, fit([as_rate(run) for run in sweep()], draws=0).time
    assert told is not None and derived is not None
    for one, other in zip(told.coefficients, derived.coefficients, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4)


def test_a_repeated_run_counts_once_and_the_later_row_counts() -> None:
    wrong = [dataclasses.replace(run, step_seconds=99.0) for run in sweep()]
    assert fit([*wrong, *sweep()], draws=0).time == fit(sweep(), draws=0).time


def test_too_few_runs_say_what_to_profile_next() -> None:
    with pytest.raises(InputError) as caught:
        fit(sweep()[:2], draws=0)
    message = str(caught.value)
    assert message.startswith("table: 2 usable runs of nano are too few") and "\n" not in message
    assert "vramcalc profile --model nano,micro,mini" in message


def test_a_table_of_failures_is_too_few() -> None:
    failed = [dataclasses.replace(run, outcome="oom") for run in sweep()]
    with pytest.raises(InputError, match=r"0 usable runs \(12 more did not end ok"):
        fit(failed, draws=0)


def on(run: MeasuredRun, accelerator: str, device: str | None) -> MeasuredRun:
    return dataclasses.replace(
        run,
        run=f"{run.run}-{accelerator}-{device}",
        setup=dataclasses.replace(run.setup, accelerator=accelerator),
        environment=json.dumps({"device": device}) if device else None,
    )


def test_runs_of_two_accelerators_are_refused_until_one_is_chosen() -> None:
    runs = [*sweep(), *(on(run, "RTX-3090", None) for run in sweep())]
    with pytest.raises(InputError, match=r"of 2 accelerators \(cpu, rtx-3090\).*--accelerator cpu"):
        fit(runs, draws=0)
    assert fit(runs, accelerator="3090", draws=0).accelerator == "RTX-3090"
    assert len(fit(runs, accelerator="CPU", draws=0).runs) == 12
    with pytest.raises(InputError, match="accelerator: no row is of 'T4'; the table holds RTX-3090, cpu"):
        fit(runs, accelerator="T4", draws=0)


def test_runs_of_two_devices_with_one_accelerator_name_are_refused_until_one_is_chosen() -> None:
    runs = [*(on(run, "cpu", "EPYC") for run in sweep()), *(on(run, "cpu", "Xeon") for run in sweep())]
    with pytest.raises(InputError, match=r"of 2 devices \(EPYC, Xeon\).*--accelerator 'EPYC'"):
        fit(runs, draws=0)
    assert fit(runs, accelerator="Xeon", draws=0).device == "Xeon"


def test_a_table_without_accelerators_is_refused() -> None:
    runs = [dataclasses.replace(run, setup=Setup(model="nano", precision="fp32")) for run in sweep()]
    with pytest.raises(InputError, match="no row names its accelerator"):
        fit(runs, draws=0)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        (None, None),
        ("not json", None),
        ("[1]", None),
        ('{"device": 3}', None),
        ('{"device": "A100", "device_kind": "cuda", "threads": 8}', "A100"),
        ('{"device": "Xeon", "device_kind": "cpu", "threads": 8}', "Xeon, 8 threads"),
    ],
)
def test_a_cpu_is_named_with_its_threads(environment: str | None, name: str | None) -> None:
    run = MeasuredRun(run="a", setup=Setup(model="nano"), environment=environment)
    assert device_name(run) == name


def test_every_law_is_of_a_column_of_the_table() -> None:
    assert set(QUANTITIES) <= {spec.name for spec in dataclasses.fields(MeasuredRun)}
