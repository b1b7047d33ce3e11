"""``vramcalc fit`` as a user runs it: a table in, laws out."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estimator.calibration.file import read_calibration
from estimator.measured import MeasuredRun
from estimator.memory.checkpoint import checkpoint_bytes
from estimator.memory.formula import memory_phases
from estimator.model.catalog import resolve_model
from estimator.setup import Setup
from profiler.store import write_runs


def vramcalc(*arguments: str, home: Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_DATA_HOME": str(home), "COLUMNS": str(columns)}
    code = "from vramcalc.main import run; run()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def made_up_run(model: str, seq: int, batch: int, outcome: str = "ok") -> MeasuredRun:
    """Peaks and checkpoints as the formulas say, a device that holds 500 MB more, 20 MFLOP a token-parameter second."""
    setup = Setup(model=model, accelerator="cpu", precision="fp32", seq=seq, batch=batch)
    shape, resolved = resolve_model(model), setup.resolved()
    peak = max(phase.bytes for phase in memory_phases(shape, resolved))
    return MeasuredRun(
        run=f"{model}-{seq}-{batch}-{outcome}",
        setup=setup,
        outcome=outcome,
        reason=None if outcome == "ok" else "not enough memory",
        peak_allocated_bytes=peak,
        peak_device_bytes=500_000_000 + peak,
        step_seconds=0.01 + 2e-10 * batch * seq * shape.layers * shape.hidden**2,
        checkpoint_bytes=sum(checkpoint_bytes(shape, resolved)),
    )


@pytest.fixture
def table(tmp_path: Path) -> Path:
    runs = [made_up_run(*point) for point in itertools.product(("nano", "micro", "mini"), (128, 256), (1, 2))]
    path = tmp_path / "runs.csv"
    write_runs(path, [*runs, made_up_run("mini", 4096, 8, outcome="oom")])
    return path


@pytest.mark.parametrize("columns", [60, 120])
def test_fit_writes_a_calibration_and_says_how_good_it_is(table: Path, tmp_path: Path, columns: int) -> None:
    out = tmp_path / "calibration.json"
    done = vramcalc("fit", str(table), "--out", str(out), "--draws", "20", home=tmp_path, columns=columns)
    assert done.returncode == 0, done.stderr
    assert "Laws of cpu, from 12 runs" in done.stdout
    said = " ".join(done.stdout.split())
    assert "Step time (12 runs) matmul_flops[fp32]" in said
    assert "Without the largest model, mini (2.19e+07 parameters): its 4 runs predicted from the other 8, " in said
    assert "1 run for every law: the run ended as oom" in said
    assert all(len(line) <= columns for line in done.stdout.splitlines())
    assert "\x1b" not in done.stdout
    assert done.stderr.strip() == f"saved: {out}"
    laws = read_calibration(out)
    assert laws.accelerator == "cpu" and len(laws.runs) == 12
    assert not (tmp_path / "vramcalc").exists()


def test_without_out_the_laws_are_saved_for_this_machine(table: Path, tmp_path: Path) -> None:
    done = vramcalc("fit", str(table), "--draws", "20", home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert read_calibration(tmp_path / "home" / "vramcalc" / "calibration-cpu.json").accelerator == "cpu"


def test_save_keeps_the_laws_in_both_places(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "calibration.json"
    done = vramcalc("fit", str(table), "--out", str(out), "--save", "--draws", "20", home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert read_calibration(out) == read_calibration(tmp_path / "home" / "vramcalc" / "calibration-cpu.json")


def test_json_prints_the_calibration_and_nothing_else(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "calibration.json"
    done = vramcalc("fit", str(table), "--out", str(out), "--json", "--draws", "20", home=tmp_path)
    assert json.loads(done.stdout) == json.loads(out.read_text())


def test_several_tables_are_one(table: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.parquet"
    write_runs(more, [made_up_run("small", 128, 1), made_up_run("small", 256, 1)])
    out = tmp_path / "calibration.json"
    done = vramcalc("fit", str(table), str(more), "--out", str(out), "--draws", "20", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(read_calibration(out).runs) == 14


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "table: cannot read"),
        ("", "has no rows"),
        ("a,b\n1,2\n", "has no column 'run'"),
        ("run,model,accelerator,seq,batch\nr1,nano,cpu,128,1\n", "1 usable runs of nano are too few for a law"),
        (
            "run,model,accelerator\nr1,nano,cpu\n",
            "none of its 1 rows can be used; the first, run r1: not stated: seq and batch",
        ),
        ("run,model,method,accelerator\nr1,nano,magic,cpu\n", "the first, run r1: method: 'magic' is not known"),
        ("run,model,seq,batch\nr1,nano,128,1\n", "no row names its accelerator"),
    ],
)
def test_a_table_that_cannot_be_fitted_is_one_line_and_exit_code_2(
    in_process: Callable[..., Any], tmp_path: Path, content: str | None, said: str
) -> None:
    table = tmp_path / "bad.csv"
    if content is not None:
        table.write_text(content)
    done = in_process(
        "fit", str(table), "--out", str(tmp_path / "c.json"), environment={"XDG_DATA_HOME": str(tmp_path)}
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "c.json").exists()


def test_an_output_that_cannot_be_written_is_said_before_the_table_is_read(tmp_path: Path) -> None:
    done = vramcalc("fit", str(tmp_path / "gone.csv"), "--out", str(tmp_path), home=tmp_path)
    assert done.returncode == 2
    assert "is a directory" in done.stderr and "gone.csv" not in done.stderr
