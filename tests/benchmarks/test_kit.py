"""Both GPU scripts in their CPU form: real points and kernels, limits, resuming; and what reads their results."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, gpu_rates, gpu_truth
from benchmarks.own_results import is_held_back, own_results
from benchmarks.own_results import main as own_results_main
from benchmarks.rate_cases import rate_cases
from estimator.errors import InputError
from estimator.measured import MeasuredRun
from estimator.setup import Setup
from harness.point import run_key
from harness.sweep import OUT_OF_TIME
from profiler.store import read_runs, write_runs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny form is that of a CPU")
HEADER = "why,model,framework,precision,checkpointing,seq,batch,trace\n"


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three points in the full matrix's format; the models shrink to nano."""
    path = tmp_path_factory.mktemp("matrix") / "matrix.csv"
    rows = ("hf-trainer,fp32,", "torch-loop,fp32,", "hf-trainer,bf16-mixed,full")
    path.write_text(HEADER + "".join(f"a,smollm2-135m,{row},512,1,yes\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, matrix: Path) -> Path:
    """What the first two points left."""
    out = tmp_path_factory.mktemp("results") / "cpu-2000-01-01"
    cache = str(tmp_path_factory.mktemp("cache"))
    arguments = [
        "--out",
        str(out),
        "--matrix",
        str(matrix),
        "--cache",
        cache,
        "--warmup-steps",
        "1",
        "--timed-steps",
        "2",
    ]
    assert gpu_truth.main([*arguments, "--points", "2"]) == 0
    first = (out / "measured_runs.csv").read_text().splitlines()
    assert gpu_truth.main(arguments) == 0  # goes on
    assert (out / "measured_runs.csv").read_text().splitlines()[:3] == first
    return out


def test_points_are_rows_with_memory_by_phase_time_and_checkpoint(out: Path) -> None:
    runs = read_runs(out)
    assert [(run.setup.framework, run.setup.model, run.outcome) for run in runs] == [
        ("hf-trainer", "nano-llama", "ok"), ("torch-loop", "nano-llama", "ok"), ("hf-trainer", "nano-llama", "ok"),
    ]  # fmt: skip
    for run in runs:
        phases = (run.peak_forward_bytes, run.peak_backward_bytes, run.peak_optimizer_bytes)
        assert run.peak_allocated_bytes and run.peak_allocated_bytes >= max(phase or 0 for phase in phases) > 0
        assert run.peak_reserved_bytes and run.peak_device_bytes
        assert run.step_seconds and run.step_seconds_spread is not None and run.timed_steps == 2
        assert run.checkpoint_bytes and run.checkpoint_model_bytes and run.checkpoint_optimizer_bytes
    facts = json.loads((out / "environment.json").read_text())
    assert facts["device_kind"] == "cpu" and facts["libraries"]["torch"] and facts["preloaded"]
    assert not (out / "logs").exists() and not (out / "probe.log").exists()


def test_when_the_time_is_over_no_point_is_begun(
    matrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_truth, "ForkServer", None)
    assert gpu_truth.main(["--out", str(tmp_path / "r"), "--matrix", str(matrix), "--minutes", "0.01"]) == 0
    assert "0 of 3 points measured (none)" in capsys.readouterr().err
    assert not (tmp_path / "r" / "measured_runs.csv").exists()


def test_only_what_the_end_of_the_time_cut_off_is_run_again(
    matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter(("ok", "oom", "cut off", "ok"))
    ran: list[Setup] = []

    class Executor(gpu_truth._TruthExecutor):
        def run(self, setup: Setup, scratch: Path, log: Path) -> MeasuredRun:
            ran.append(setup)
            outcome = next(outcomes)
            reason = f"{OUT_OF_TIME} after 3 s" if outcome == "cut off" else None
            outcome = "timeout" if outcome == "cut off" else outcome
            return MeasuredRun(
                run=run_key(setup, self._procedure, self._device), setup=setup, outcome=outcome, reason=reason
            )

    monkeypatch.setattr(gpu_truth, "_TruthExecutor", Executor)
    monkeypatch.setattr(gpu_truth, "_server", lambda device, out: contextlib.nullcontext())
    arguments = ["--out", str(tmp_path), "--matrix", str(matrix), "--cache", str(tmp_path)]
    gpu_truth.main(arguments)
    assert [run.outcome for run in read_runs(tmp_path)] == ["ok", "oom", "timeout"]
    gpu_truth.main(arguments)
    assert [run.outcome for run in read_runs(tmp_path)] == ["ok", "oom", "ok"]
    assert len(ran) == 4 and ran[2] == ran[3]


def test_edges_are_run_on_until_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    class Executor(gpu_truth._TruthExecutor):
        def run(self, setup: Setup, scratch: Path, log: Path) -> MeasuredRun:
            ran.append(setup.batch)
            outcome = "ok" if setup.batch <= 4 else "oom"
            return MeasuredRun(run=run_key(setup, self._procedure, self._device), setup=setup, outcome=outcome)

    (tmp_path / "matrix.csv").write_text(HEADER + "edge,smollm2-135m,hf-trainer,fp32,,512,2,\n")
    monkeypatch.setattr(gpu_truth, "_TruthExecutor", Executor)
    monkeypatch.setattr(gpu_truth, "_server", lambda device, out: contextlib.nullcontext())
    arguments = ["--out", str(tmp_path / "r"), "--matrix", str(tmp_path / "matrix.csv"), "--cache", str(tmp_path)]
    for _ in range(2):
        assert gpu_truth.main(arguments) == 0
        assert ran == [2, 3, 4, 5]
    assert [run.outcome for run in read_runs(tmp_path / "r")] == ["ok", "ok", "ok", "oom"]


def test_a_large_checkpoint_is_written_where_the_disk_has_room_and_once_of_each_kind() -> None:
    gib = 2**30
    assert gpu_truth.checkpoint_limit_bytes(10 * gib, 90.0, known=False) == 8 * gib
    assert gpu_truth.checkpoint_limit_bytes(10 * gib, 90.0, known=True) == 4 * gib
    assert gpu_truth.checkpoint_limit_bytes(2 * gib, 90.0, known=True) == round(1.6 * gib)
    # In 45 s of a point's 90 a disk writes 22.5 GB.
    assert gpu_truth.checkpoint_limit_bytes(10**13, 90.0, known=False) == 22_500_000_000
    one, other = Setup(model="llama-3.2-1b", batch=1), Setup(model="llama-3.2-1b", batch=8, seq=64)
    assert gpu_truth._checkpoint_kind(one) == gpu_truth._checkpoint_kind(other)
    assert gpu_truth._checkpoint_kind(one) != gpu_truth._checkpoint_kind(Setup(model="llama-3.2-1b", optimizer="sgd"))


def test_rates_are_rows_and_resume(tmp_path: Path) -> None:
    assert gpu_rates.main(["--out", str(tmp_path), "--cases", "3", "--tiny"]) == 0
    first = (tmp_path / "rates.csv").read_text()
    assert gpu_rates.main(["--out", str(tmp_path), "--tiny"]) == 0
    assert (tmp_path / "rates.csv").read_text().startswith(first)
    with (tmp_path / "rates.csv").open() as file:
        rows = list(csv.DictReader(file))
    kinds = {row["kernel"].partition("-")[0] for row in rows}
    assert {"launch", "matmul", "attention", "copy", "softmax", "step", "clip", "cross"} <= kinds
    assert len(rows) == sum(not case.needs_gpu for case in rate_cases(tiny=True))
    product = next(row for row in rows if row["kernel"] == "matmul-nt" and row["shape"] == "128x128x128")
    assert float(product["flops"]) == 2 * 128**3
    assert float(product["flops_per_second"]) == pytest.approx(2 * 128**3 / float(product["seconds"]), rel=1e-4)
    assert all(float(row["seconds"]) > 0 for row in rows)


def test_rates_do_not_overwrite_another_table(tmp_path: Path) -> None:
    (tmp_path / "rates.csv").write_text("kernel,shape\na,b\n")
    with pytest.raises(InputError, match="is not a table of rates"):
        gpu_rates.main(["--out", str(tmp_path), "--tiny"])
    (tmp_path / "rates.csv").write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match="is not a table of rates"):
        gpu_rates.main(["--out", str(tmp_path), "--tiny"])
    with pytest.raises(InputError, match="cannot make the directory"):
        gpu_rates.main(["--out", str(tmp_path / "rates.csv"), "--tiny"])


@pytest.mark.parametrize("wrong", [("--minutes", "nan"), ("--minutes", "-1"), ("--minutes", "x")])
def test_a_wrong_limit_is_refused_in_one_line(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for script, counted in ((gpu_truth, "--points"), (gpu_rates, "--cases")):
        for arguments in (wrong, (counted, "0"), (counted, "-3")):
            with pytest.raises(SystemExit) as ended:
                script.main(arguments)
            assert ended.value.code == 2
            assert f"argument {arguments[0]}: " in capsys.readouterr().err.splitlines()[-1]


def test_full_and_tiny_rates_have_the_same_kernels_and_no_case_twice() -> None:
    full, tiny = list(rate_cases(tiny=False)), list(rate_cases(tiny=True))
    for cases in (full, tiny):
        assert len({(case.kernel, case.shape, case.dtype) for case in cases}) == len(cases)
    without = {
        f"attention-{kernel}-{passes}" for kernel in ("cudnn", "efficient") for passes in ("forward", "backward")
    }
    assert {case.kernel for case in full} - {case.kernel for case in tiny} == without
    assert all(case.flops or case.bytes or case.calls > 1 for case in full)


def test_a_third_is_held_back_by_the_runs_id_alone(out: Path) -> None:
    ids = [f"p{number:012x}" for number in range(3000)]
    held = [name for name in ids if is_held_back(name)]
    assert 900 < len(held) < 1100
    assert [is_held_back(name) for name in ("p000000000000", "p000000000001", "p000000000002", "p000000000003")] == [
        False, True, False, False,
    ]  # fmt: skip
    (results,) = own_results(out.parent)
    runs = read_runs(out)
    assert {run.run for run in (*results.fitted, *results.held_back)} == {run.run for run in runs}
    assert all(is_held_back(run.run) for run in results.held_back)
    assert not any(is_held_back(run.run) for run in results.fitted)


def test_times_of_a_machine_that_others_kept_busy_are_no_evidence(out: Path, tmp_path: Path) -> None:
    def under(load: float, run: MeasuredRun) -> MeasuredRun:
        facts = json.loads(run.environment or "{}") | {"load_average": load, "cores": 2}
        return dataclasses.replace(run, environment=json.dumps(facts))

    first, second, *_ = read_runs(out)
    (tmp_path / "cpu-2000-01-01").mkdir()
    write_runs(tmp_path / "cpu-2000-01-01" / "measured_runs.csv", [under(2.4, first), under(2.6, second)])
    (results,) = own_results(tmp_path)
    quiet, busy = sorted((*results.fitted, *results.held_back), key=lambda run: run.run != first.run)
    assert quiet == under(2.4, first) and quiet.step_seconds
    assert (busy.step_seconds, busy.tokens_per_second_per_accelerator, busy.checkpoint_seconds) == (None, None, None)
    assert busy.peak_allocated_bytes == second.peak_allocated_bytes and busy.checkpoint_bytes == second.checkpoint_bytes


def test_directories_without_a_table_are_no_results(out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "some-gpu").mkdir()
    write_runs(tmp_path / "some-gpu" / "measured_runs.csv", read_runs(out))
    assert [results.directory.name for results in own_results(tmp_path)] == ["some-gpu"]


def test_the_accuracy_page_shows_both_parts_by_themselves(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.own_results.own_results", lambda: own_results(out.parent))
    title, table = accuracy.measured_here()
    assert "Measured by ourselves" in title
    found = own_results(out.parent)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    counts = {part: int(n) for name, quantity, part, n, *_ in rows if quantity == "allocated"}
    assert {row[0] for row in rows} == {out.name}
    expected = {"may be fitted to": len(found.fitted), "held back": len(found.held_back)}
    assert counts == {part: count for part, count in expected.items() if count}
    monkeypatch.setattr("benchmarks.own_results.own_results", list)
    assert accuracy.measured_here() == []


def test_what_is_kept_in_the_repository_is_shown_without_the_times_of_a_busy_machine() -> None:
    kept = {found.directory.name: found for found in own_results()}
    cpu = kept["cpu-2026-11-24"]
    runs = (*cpu.fitted, *cpu.held_back)
    assert len(runs) == 68 and {run.outcome for run in runs} == {"ok"}
    assert {run.setup.base_quantization for run in runs} == {None, "nf4", "nf4-dq"}
    assert not any(run.step_seconds for run in runs) and all(run.peak_allocated_bytes for run in runs)
    lines = [line for line in accuracy.measured_here()[1].splitlines() if line.startswith("| cpu-2026-11-24 | ")]
    assert {line.split(" | ")[1] for line in lines} == {"allocated", "reserved", "device", "checkpoint"}


def test_each_part_is_printed_as_a_table(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = own_results(out.parent)
    for flags, expected in (((), found.fitted), (("--held-back",), found.held_back)):
        capsys.readouterr()
        assert own_results_main([str(out), *flags]) == 0
        (tmp_path / "part.csv").write_text(capsys.readouterr().out)
        if expected:
            assert tuple(read_runs(tmp_path / "part.csv")) == expected
