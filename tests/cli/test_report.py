"""``vramcalc report`` as a user runs it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from estimator.calibration.file import write_calibration
from estimator.calibration.laws import fit
from estimator.estimate import estimate
from estimator.measured import MeasuredRun
from estimator.setup import Setup
from profiler.store import write_runs
from vramcalc.main import run as vramcalc


def measured_runs(accelerator: str = "cpu") -> list[MeasuredRun]:
    """What the formula says of three small models, a few percent off, in a known pattern."""
    runs = []
    for model in ("nano", "micro", "mini"):
        for batch in (1, 4):
            for seq in (128, 256):
                setup = Setup(model=model, precision="fp32", batch=batch, seq=seq, accelerator=accelerator)
                expected = estimate(setup)
                off = 1 + 0.02 * math.sin(len(runs))
                peak = round(expected.memory.peak_allocated_bytes.value * off)
                runs.append(
                    MeasuredRun(
                        run=f"{model}-{batch}-{seq}", setup=setup, source="vramcalc profile: test",
                        parameters=expected.model.parameters, trainable_parameters=expected.model.parameters,
                        peak_allocated_bytes=peak, step_seconds=1e-10 * expected.model.parameters * batch * seq * off,
                        checkpoint_bytes=expected.checkpoint.bytes,
                    )
                )  # fmt: skip
    runs.append(
        MeasuredRun(run="big", setup=Setup(model="base", accelerator=accelerator), outcome="oom", reason="too big")
    )
    return runs


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    write_runs(path, measured_runs())
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        vramcalc(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_a_table_alone_makes_a_report(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "sub" / "report.html"
    done = subprocess.run(
        [sys.executable, "-m", "vramcalc", "report", table, "--out", out, "--title", "My <runs>"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"{out}: 13 runs, ")
    html = out.read_text(encoding="utf-8")
    assert "<h1>My &lt;runs&gt;</h1>" in html
    assert "No law was fitted" in html
    assert "too big" in html


def test_laws_and_losses_are_shown_with_the_runs(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    laws = tmp_path / "calibration.json"
    write_calibration(laws, fit(measured_runs(), draws=20))
    training = tmp_path / "train"
    training.mkdir()
    lines = [
        {"step": step, "epoch": float(step), "kind": kind, "loss": loss}
        for step, kind, loss in ((1, "train", 4.0), (1, "eval", 4.0), (2, "train", 3.0), (2, "eval", 5.0))
    ]
    (training / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "report.html"
    code, _, err = run(capsys, table, "--calibration", laws, "--training", training, "--out", out)
    assert (code, err) == (0, "")
    html = out.read_text(encoding="utf-8")
    for identifier in ("coefficients", "held-out", "predictions", "residuals", "training", "memory-seq-title"):
        assert f'id="{identifier}"' in html
    assert "from epoch 1 on it overfits" in html


def test_a_run_in_two_tables_is_shown_once(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, table, table, "--out", tmp_path / "report.html")
    assert code == 0
    assert ": 13 runs, " in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "runs.csv"),
        (b"\xff\xfe\x00garbage", "runs.csv"),
        (b"a,b\n1,2\n", "runs.csv"),
    ],
)
def test_a_bad_table_is_one_line_and_leaves_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    table = tmp_path / "runs.csv"
    table.write_bytes(content)
    code, out, err = run(capsys, table, "--out", tmp_path / "report.html")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "report.html").exists()


def test_a_table_of_unreadable_rows_alone_makes_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.csv").write_text("run,model,method\nr1,nano,magic\n")
    code, out, err = run(capsys, tmp_path / "runs.csv", "--out", tmp_path / "report.html")
    assert (code, out) == (2, "")
    assert err.startswith("error: table: none of the 1 rows of ") and "run r1: method: 'magic'" in err
    assert not (tmp_path / "report.html").exists()


def test_a_missing_table_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, tmp_path / "nothing.csv", "--out", tmp_path / "report.html")
    assert code == 2
    assert err.count("\n") == 1
    assert "nothing.csv" in err


def test_the_output_path_is_checked_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, tmp_path / "nothing.csv", "--out", tmp_path)
    assert code == 2
    assert err.startswith("error: out: ")


def test_a_bad_calibration_or_training_is_one_line(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--calibration", "--training"):
        code, _, err = run(capsys, table, option, table, "--out", tmp_path / "report.html")
        assert code == 2
        assert err.count("\n") == 1
        assert err.startswith(f"error: {option.removeprefix('--')}: ")


def test_the_laws_of_another_device_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laws, table = tmp_path / "calibration.json", tmp_path / "runs.csv"
    write_calibration(laws, fit(measured_runs(), draws=20))
    write_runs(table, measured_runs("RTX-3090"))
    code, _, err = run(capsys, table, "--calibration", laws, "--out", tmp_path / "report.html")
    assert code == 2
    assert "is of cpu, and the tables hold runs of RTX-3090 only" in err
