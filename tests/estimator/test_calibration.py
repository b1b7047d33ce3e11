"""Applying laws: expected numbers worked out by hand from the coefficients."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.calibration.applying import (
    apply_checkpoint,
    apply_device,
    apply_memory,
    apply_reserved,
    apply_time,
    caveats,
)
from estimator.calibration.file import (
    check_writable,
    default_path,
    read_calibration,
    saved_for,
    to_document,
    write_calibration,
)
from estimator.calibration.fitting import (
    Calibration,
    Coefficient,
    Dropped,
    HeldOut,
    Law,
    Range,
    canonical_name,
    compute_type,
    matches,
    seconds_by_term,
)
from estimator.errors import InputError
from estimator.memory.formula import PhaseMemory
from estimator.result import Part
from estimator.score import Score
from estimator.setup import Setup
from estimator.speed.compute import StepWork
from estimator.units import Interval


def law(
    quantity: str,
    *,
    draws: tuple[tuple[float, ...], ...] = (),
    residual: float = 0.01,
    drift: float = 0.02,
    largest: float = 1e15,
    **values: float,
) -> Law:
    return Law(
        quantity=quantity,
        coefficients=tuple(
            Coefficient(name=name, unit="", value=value, low=value, high=value) for name, value in values.items()
        ),
        draws=draws,
        runs=12,
        residual=residual,
        drift=drift,
        largest=largest,
        held_out=None,
    )


def memory_law(**values: float) -> Law:
    names = {"states": 1.0, "activations": 1.0, "logits": 1.0, "temporaries": 1.0, "constant": 0.0}
    return law("peak_allocated_bytes", **{**names, **values})


def time_law(
    fp32: tuple[float, float, float],
    others: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    step: float = 0.0,
) -> Law:
    names = ("matmul_flops[fp32]", "head_flops[fp32]", "attention_flops[fp32]", "elementwise_bytes", "logits_bytes", "optimizer_bytes", "launches")  # fmt: skip
    return law("step_seconds", largest=1e6, **dict(zip(names, (*fp32, *others), strict=True)), step=step)


def calibration(**given: Any) -> Calibration:
    values: dict[str, Any] = {
        "accelerator": "cpu",
        "device": "Test CPU",
        "environment": None,
        "created": "2026-01-01T00:00:00+00:00",
        "runs": ("a", "b"),
        "dropped": (),
        "range": Range(
            parameters_low=1_000_000,
            parameters_high=20_000_000,
            tokens_low=128,
            tokens_high=512,
            models=("nano", "mini"),
            precisions=("fp32",),
            methods=("full",),
            frameworks=("hf-trainer",),
            optimizers=("adamw-fused",),
            checkpointings=("none",),
            attentions=("sdpa",),
        ),
        "memory": None,
        "reserved": None,
        "device_memory": None,
        "time": None,
        "checkpoint": None,
    }
    return Calibration(**{**values, **given})


def phase(name: str, **amounts: float) -> PhaseMemory:
    parts = tuple(Part(name=part, amount=amount, formula=part, source="test") for part, amount in amounts.items())
    return PhaseMemory(phase=name, parts=parts)


WORK = StepWork(
    matmul_flops=1e12,
    head_flops=1e11,
    attention_flops=1e10,
    elementwise_bytes=1e9,
    logits_bytes=1e8,
    optimizer_bytes=1e7,
    communication_bytes=0.0,
    launches=1000.0,
    model_flops=1.11e12,
)


def test_each_group_of_parts_is_scaled_and_the_constant_is_workspace() -> None:
    laws = calibration(memory=memory_law(states=1.0, activations=1.5, logits=0.5, temporaries=2.0, constant=7.0))
    phases = (
        phase("forward", parameters=100, activations=1000, logits=400),
        phase("optimizer", parameters=100, optimizer=200, temporaries=50),
    )
    found = apply_memory(laws, phases)
    assert found is not None
    assert found.phase == "forward"
    assert {part.name: part.amount for part in found.parts} == {
        "parameters": 100,
        "activations": 1500,
        "logits": 200,
        "workspace": 7,
    }
    assert found.peak_allocated_bytes.value == 1807


def test_the_law_can_move_the_peak_to_another_phase() -> None:
    laws = calibration(memory=memory_law(activations=0.1))
    phases = (phase("forward", parameters=100, activations=1000), phase("optimizer", parameters=100, optimizer=200))
    found = apply_memory(laws, phases)
    assert found is not None
    assert (found.phase, found.peak_allocated_bytes.value) == ("optimizer", 300)


def test_the_constant_joins_a_workspace_that_is_already_there() -> None:
    laws = calibration(memory=memory_law(constant=5.0))
    found = apply_memory(laws, (phase("forward", parameters=100, workspace=10),))
    assert found is not None
    assert [(part.name, part.amount) for part in found.parts] == [("parameters", 100), ("workspace", 15)]


AMOUNTS = st.integers(0, 10**13)


@given(AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS, st.lists(st.floats(0, 3), min_size=5, max_size=5))
def test_parts_sum_exactly_to_the_peak_which_more_bytes_never_lower(
    parameters: int, activations: int, logits: int, more: int, values: list[float]
) -> None:
    names = ("states", "activations", "logits", "temporaries", "constant")
    laws = calibration(memory=memory_law(**dict(zip(names, values, strict=True))))

    def peak(extra: int) -> float:
        phases = (
            phase("forward", parameters=parameters, activations=activations + extra, logits=logits),
            phase("optimizer", parameters=parameters, optimizer=2 * parameters, temporaries=parameters),
        )
        found = apply_memory(laws, phases)
        assert found is not None
        assert sum(part.amount for part in found.parts) == found.peak_allocated_bytes.value
        assert all(part.amount == int(part.amount) for part in found.parts)
        return found.peak_allocated_bytes.value

    assert peak(more) >= peak(0) - 3  # parts are rounded one by one; the highest phase is chosen before


def test_step_seconds_are_the_sum_of_work_times_coefficients() -> None:
    laws = calibration(time=time_law(fp32=(1e-12, 2e-12, 4e-12), others=(1e-9, 2e-9, 3e-9, 1e-5), step=0.5))
    found = apply_time(laws, WORK, Setup(model="nano", precision="fp32"))
    assert found is not None
    # 1 + 0.2 + 0.04 for the products, 1 + 0.2 + 0.03 for the traffic, 0.01 for launches, 0.5 for the step
    assert found.step_seconds.value == pytest.approx(2.98)
    assert sum(part.amount for part in found.parts) == pytest.approx(found.step_seconds.value)
    assert {part.name for part in found.parts} == {
        "matrix products", "head", "attention", "elementwise", "logits", "optimizer", "launches", "loop",
    }  # fmt: skip


def test_on_an_accelerator_launches_hide_behind_the_work() -> None:
    # 1 s of matrix products and 0.5 s of launches, joined by the fourth power: (1 + 0.0625)^(1/4) s, then the loop's 0.2 s.
    time = time_law(fp32=(1e-12, 0.0, 0.0), others=(0.0, 0.0, 0.0, 5e-4), step=0.2)
    setup = Setup(model="nano", precision="fp32")
    gpu, cpu = (
        apply_time(calibration(accelerator="T4", time=time), WORK, setup),
        apply_time(calibration(time=time), WORK, setup),
    )
    assert gpu is not None and cpu is not None
    assert gpu.step_seconds.value == pytest.approx(1.0625**0.25 + 0.2)
    assert sum(part.amount for part in gpu.parts) == pytest.approx(gpu.step_seconds.value)
    assert cpu.step_seconds.value == pytest.approx(1.7)  # a CPU launches and computes in turn


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1e3))
def test_more_work_or_launches_never_take_less_time(work: float, launches: float, more: float, step: float) -> None:
    names = ["matmul_flops[fp32]", "launches", "step"]
    for exponent in (1.0, 4.0):
        base = sum(seconds_by_term(names, [work, launches, 1.0], [1.0, 1.0, step], exponent))
        assert sum(seconds_by_term(names, [work + more, launches, 1.0], [1.0, 1.0, step], exponent)) >= base * (
            1 - 1e-12
        )
        assert sum(seconds_by_term(names, [work, launches + more, 1.0], [1.0, 1.0, step], exponent)) >= base * (
            1 - 1e-12
        )


def test_a_time_law_says_nothing_of_a_type_it_has_not_measured() -> None:
    laws = calibration(time=time_law(fp32=(1e-12, 1e-12, 1e-12)))
    assert apply_time(laws, WORK, Setup(model="nano", precision="bf16")) is None


def test_a_time_law_says_nothing_of_several_devices() -> None:
    laws = calibration(time=time_law(fp32=(1e-12, 1e-12, 1e-12)))
    assert apply_time(laws, WORK, Setup(model="nano", precision="fp32", accelerators=2)) is None


def test_without_a_law_nothing_is_applied() -> None:
    laws = calibration()
    setup = Setup(model="nano", precision="fp32")
    assert apply_memory(laws, (phase("forward", parameters=1),)) is None
    assert apply_time(laws, WORK, setup) is None
    assert apply_reserved(laws, Interval.exactly(1.0)) is None
    assert apply_device(laws, Interval.exactly(1.0)) is None
    assert apply_checkpoint(laws, 1, 2) is None


def test_reserved_and_device_memory_lie_on_top_of_allocated() -> None:
    laws = calibration(
        reserved=law("peak_reserved_bytes", constant=100.0, ratio=1.1),
        device_memory=law("peak_device_bytes", constant=1000.0, ratio=1.2),
    )
    allocated = Interval(value=10_000.0, low=9_000.0, high=11_000.0)
    reserved, device = apply_reserved(laws, allocated), apply_device(laws, allocated)
    assert reserved is not None and device is not None
    assert (reserved.value, device.value) == (11_100.0, 13_000.0)
    # The allocated peak's own 10% goes into the interval.
    assert reserved.high / reserved.value - 1 >= 0.1


def test_a_checkpoint_is_the_formula_times_the_ratio_and_the_rest() -> None:
    laws = calibration(checkpoint=law("checkpoint_bytes", constant=50.0, ratio=1.01))
    found = apply_checkpoint(laws, 1000, 2000)
    assert found is not None
    assert (found.bytes.value, found.model_bytes, found.optimizer_bytes) == (3080.0, 1010, 2020)


def test_intervals_hold_the_draws_and_widen_beyond_what_was_fitted() -> None:
    near = law("checkpoint_bytes", constant=0.0, ratio=1.0, draws=((0.0, 0.9), (0.0, 1.0), (0.0, 1.1)), largest=1000.0)
    laws = calibration(checkpoint=near)
    inside, beyond = apply_checkpoint(laws, 1000, 0), apply_checkpoint(laws, 100_000, 0)
    assert inside is not None and beyond is not None
    assert inside.bytes.low < 910 < 1090 < inside.bytes.high
    assert beyond.bytes.high / beyond.bytes.value > inside.bytes.high / inside.bytes.value


def test_error_grows_with_the_logarithm_of_the_extrapolation() -> None:
    one = law("checkpoint_bytes", constant=0.0, ratio=1.0, residual=0.02, drift=0.03, largest=1000.0)
    assert one.error_at(500.0) == 0.02
    assert one.error_at(1000.0 * 2.718281828459045**2) == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("precision", "autocast", "kind"),
    [("fp32", None, "fp32"), ("bf16-mixed", None, "bf16"), ("bf16", None, "bf16"), ("fp16", "bf16", "bf16"), ("nvfp4-mixed", None, "nvfp4")],
)  # fmt: skip
def test_the_compute_type_is_what_matrix_products_run_in(precision: str, autocast: str | None, kind: str) -> None:
    assert compute_type(Setup(model="nano", precision=precision, autocast=autocast)) == kind


def test_caveats_name_what_was_never_measured() -> None:
    said = caveats(calibration(), Setup(model="8e9", precision="bf16", seq=8192), parameters=8_000_000_000)
    text = "\n".join(said)
    assert "8e+09 parameters, 400 times the largest measured" in text
    assert "8.19e+03 tokens in a micro-batch, 16 times" in text
    assert "precision bf16 was never measured on this device (only fp32)" in text
    assert "method" not in text


def test_a_setup_inside_the_measured_range_has_no_caveat() -> None:
    assert caveats(calibration(), Setup(model="nano", precision="fp32", seq=128), parameters=5_000_000) == ()


def test_an_accelerator_matches_under_any_of_its_names() -> None:
    laws = calibration(accelerator="RTX-3090")
    assert matches(laws, "rtx-3090") and matches(laws, "3090")
    assert not matches(laws, "cpu") and not matches(laws, None)
    assert canonical_name("Some Prototype") == "some prototype"


def test_applying_laws_needs_neither_numpy_nor_scipy() -> None:
    code = (
        "import sys, estimator.calibration.file, estimator.validation; "
        "heavy = {'numpy', 'scipy', 'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the file ---------------------------------------------------------------------------------------------------------


def full_calibration() -> Calibration:
    """Every field filled."""
    held_out = HeldOut(
        what="the largest model, mini",
        runs=("b",),
        fitted_runs=8,
        reach=3.5,
        score=Score(n=4, median_ape=0.01, p90_ape=0.02, p95_ape=0.03, max_ape=0.04, bias=-0.01, coverage_90=0.75),
    )
    memory = dataclasses.replace(
        memory_law(activations=1.25, constant=12.0), draws=((1.0, 1.2, 1.0, 1.0, 10.0),), held_out=held_out
    )
    return calibration(
        environment='{"torch": "2.13.0"}',
        dropped=(Dropped(run="c", quantity="all", reason="the run ended as oom"),),
        memory=memory,
        reserved=law("peak_reserved_bytes", constant=1.0, ratio=1.1),
        device_memory=law("peak_device_bytes", constant=1e8, ratio=1.1),
        time=time_law(fp32=(1e-12, 2e-12, 4e-12)),
        checkpoint=law("checkpoint_bytes", constant=50.0, ratio=1.01),
    )


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibration.json"
    write_calibration(path, full_calibration())
    assert read_calibration(path) == full_calibration()
    assert json.loads(path.read_text())["schema"] == "vramcalc/calibration/1"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, calibration())
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match=r"out: cannot write .*: No space left on device"):
        write_calibration(path, full_calibration())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def damaged(**changes: Any) -> str:
    return json.dumps({**to_document(full_calibration()), **changes})


def damaged_law(**changes: Any) -> str:
    document = to_document(full_calibration())
    return json.dumps({**document, "memory": {**document["memory"], **changes}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has schema None"),
        ('{"schema": "vramcalc/estimate/1"}', "has schema 'vramcalc/estimate/1'"),
        (damaged(schema="vramcalc/calibration/2"), "has schema 'vramcalc/calibration/2'"),
        (damaged(accelerator=None), "accelerator is None, not text"),
        (damaged(range=3), "range is not an object"),
        (damaged(runs="abc"), "runs is not a list"),
        (damaged(memory={}), "memory.quantity is missing"),
        (damaged_law(residual="small"), "memory.residual is 'small', not a number"),
        (damaged_law(residual=float("nan")), "is not JSON"),
        (damaged_law(residual=-0.1), "peak_allocated_bytes: a coefficient or a scale is negative"),
        (damaged_law(largest=0), "peak_allocated_bytes: a coefficient or a scale is negative"),
        (damaged_law(draws=[[1.0, 2.0]]), "peak_allocated_bytes: a draw does not have 5 coefficients"),
        (damaged_law(coefficients=[]), "peak_allocated_bytes: coefficients"),
        (damaged_law(quantity="checkpoint_bytes"), "checkpoint_bytes: coefficients"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_calibration_is_one_line_that_names_it(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_calibration(path)
    message = str(caught.value)
    assert message.startswith("calibration: ") and str(path) in message and said in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"calibration: cannot read .*gone\.json: No such file"):
        read_calibration(tmp_path / "gone.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not JSON"):
        read_calibration(tmp_path / "binary.json")


def test_the_machine_keeps_one_file_for_each_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path("3090") == default_path("RTX-3090") == tmp_path / "vramcalc" / "calibration-rtx-3090.json"
    assert saved_for("cpu") is None
    write_calibration(default_path("cpu"), calibration())
    assert saved_for("cpu") == calibration()
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path("../x y") == tmp_path / ".local" / "share" / "vramcalc" / "calibration-x-y.json"


def test_an_output_that_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out: .* is a directory; write a file"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out: cannot write"):
        check_writable(tmp_path / "file" / "calibration.json")
    check_writable(tmp_path / "calibration.json")
    assert not (tmp_path / "calibration.json").exists()
