"""``vramcalc profile`` as a user runs it: real points on the smallest model, kills, limits and bad input."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from profiler.store import TABLE, read_runs

CODE = "from vramcalc.main import run; run()"
NANO = ("profile", "--model", "nano", "--seq", "64", "--precision", "fp32", "--warmup-steps", "1", "--timed-steps", "2")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One cache of tokens for all of them, and no calibration."""
    home = tmp_path_factory.mktemp("home")
    return os.environ | {"XDG_CACHE_HOME": str(home), "XDG_DATA_HOME": str(home), "COLUMNS": "60"}


def vramcalc(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def start(*arguments: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (out / TABLE).exists() or len(read_runs(out)) < count:
        assert time.monotonic() < deadline, "no row was written"
        time.sleep(0.02)


def test_a_grid_becomes_a_table_of_rows_and_runs_only_once(environment: dict[str, str], tmp_path: Path) -> None:
    command = (*NANO, "--batch", "1,2", "--framework", "hf-trainer,torch-loop", "--out", str(tmp_path / "a" / "out"))
    done = vramcalc(*command, environment=environment)
    assert done.returncode == 0, done.stderr
    runs = read_runs(tmp_path / "a" / "out")
    assert [(run.setup.framework, run.setup.batch, run.outcome) for run in runs] == [
        ("hf-trainer", 1, "ok"),
        ("hf-trainer", 2, "ok"),
        ("torch-loop", 1, "ok"),
        ("torch-loop", 2, "ok"),
    ]
    assert "4/4 nano, 2 x 64" in done.stderr and "next: vramcalc fit" in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 60
    assert "Traceback" not in done.stderr and "\x1b" not in done.stdout + done.stderr

    again = vramcalc(*command, "--json", environment=environment)
    assert again.returncode == 0, again.stderr
    assert "importing torch" not in again.stderr
    document = json.loads(again.stdout)
    assert document["schema"] == "vramcalc/profile/1"
    assert [row["run"] for row in document["runs"]] == [run.run for run in runs]
    assert document["runs"][0]["peak_allocated_bytes"] == runs[0].peak_allocated_bytes
    assert read_runs(tmp_path / "a" / "out") == runs


def test_sigkill_in_the_middle_of_real_points_loses_no_row_and_leaves_no_process(
    environment: dict[str, str], tmp_path: Path
) -> None:
    command = (*NANO, "--batch", "1,2,3,4", "--out", str(tmp_path))
    process = start(*command, environment=environment)
    with process:
        wait_for_rows(tmp_path, 1)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family, "the point's process was there"
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [relative for relative in alive if relative.status() != psutil.STATUS_ZOMBIE]
    before = read_runs(tmp_path)
    assert 1 <= len(before) < 4
    done = vramcalc(*command, environment=environment)
    assert done.returncode == 0, done.stderr
    runs = read_runs(tmp_path)
    assert runs[: len(before)] == before
    assert [run.setup.batch for run in runs] == [1, 2, 3, 4]
    assert {run.outcome for run in runs} == {"ok"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", TABLE]


def test_ctrl_c_keeps_the_rows_and_says_how_to_go_on(environment: dict[str, str], tmp_path: Path) -> None:
    process = start(*NANO, "--batch", "1,2,3,4,5,6", "--out", str(tmp_path), environment=environment)
    wait_for_rows(tmp_path, 1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"[1-5] rows are in .*; the same command goes on from there", stderr)
    assert "Traceback" not in stderr
    assert 1 <= len(read_runs(tmp_path)) < 6


def test_a_point_that_cannot_fit_is_refused_before_it_is_built_unless_forced(
    in_process: Callable[..., Any], environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ("profile", "--model", "nano,llama-3.1-405b", "--seq", "64", "--out", str(out))
    done = in_process(*command, environment=environment)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: memory: llama-3.1-405b, 1 x 64, needs ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith("GiB free; leave it out, or write --force to try all the same\n")
    assert not out.exists()
    ran: list[str] = []
    monkeypatch.setattr(
        "vramcalc.commands.profile._run", lambda points, *_: ran.extend(p.setup.model for p in points) or ()
    )
    assert in_process(*command, "--force").returncode == 0
    assert ran == ["nano", "llama-3.1-405b"]


def test_points_over_their_limits_are_rows_with_a_reason_and_the_sweep_goes_on(
    environment: dict[str, str], tmp_path: Path
) -> None:
    command = (*NANO, "--seq", "64,2048", "--batch", "8", "--memory-limit", "300MiB", "--out", str(tmp_path))
    done = vramcalc(*command, environment=environment)
    assert done.returncode == 0, done.stderr
    small, large = read_runs(tmp_path)
    assert (small.outcome, large.outcome) == ("ok", "oom")
    assert "limit 314,572,800 bytes beyond the libraries" in (large.reason or "")
    assert "oom" in done.stdout
    hung = vramcalc(*NANO, "--batch", "9", "--timeout", "0.01", "--out", str(tmp_path), environment=environment)
    assert hung.returncode == 0, hung.stderr
    assert [(run.outcome, run.reason) for run in read_runs(tmp_path)[2:]] == [("timeout", "took longer than 0.01 s")]


def test_an_empty_list_in_a_config_file_is_an_error_not_an_empty_sweep(
    environment: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "grid.toml"
    config.write_text("seq = []\n")
    done = vramcalc(
        "profile", "--model", "nano", "--config", str(config), "--out", str(tmp_path / "out"), environment=environment
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: seq: an empty list is no value")


def test_plan_only_lists_the_points_and_touches_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "not there"
    done = vramcalc(*NANO, "--batch", "1,2", "--out", str(out), "--plan-only", environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 points: 0 measured, 2 to do"
    assert not out.exists()
    listed = vramcalc(*NANO, "--batch", "1,2", "--out", str(out), "--plan-only", "--json", environment=environment)
    points = json.loads(listed.stdout)["points"]
    assert [(point["measured"], point["setup"]["batch"]) for point in points] == [(False, 1), (False, 2)]


def test_planning_imports_no_torch(environment: dict[str, str], tmp_path: Path) -> None:
    code = "import sys\nfrom vramcalc.main import run\ntry: run()\nfinally: print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, *NANO, "--out", str(tmp_path), "--plan-only"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nonesuch"), "model: 'nonesuch' is not in the catalog"),
        (("--seq", "-1"), "seq: -1 is too small"),
        (("--batch", "1,,2"), "batch: '1,,2' has an empty item"),
        (("--gpu", "h100"), "accelerator: h100 is not what this machine has"),
        (("--data", "none.jsonl"), "data: no file 'none.jsonl'"),
        (("--timeout", "-3"), "timeout: -3 is not above 0"),
        (("--memory-limit", "much"), "memory_limit: 'much' is not a number"),
        (("--timed-steps", "0"), "timed_steps: 0 is too few"),
        (("--framework", "torchtitan"), "framework: torchtitan can be estimated but not run here"),
        (("--model", "5e6"), "model: 5e6 names no model that can be built; write --model NAME"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(
    in_process: Callable[..., Any],
    environment: dict[str, str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    out = tmp_path / "out"
    done = in_process(*NANO, "--out", str(out), *arguments, environment=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: " + message) and done.stderr.count("\n") == 1
    assert not out.exists()


def test_an_output_that_cannot_be_written_or_read_is_refused_before_any_work(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = vramcalc(*NANO, "--out", str(tmp_path / "file"), environment=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "out: cannot make the directory" in done.stderr
    (tmp_path / TABLE).write_bytes(b"not a table")
    for further in ((), ("--plan-only",)):
        done = vramcalc(*NANO, "--out", str(tmp_path), *further, environment=environment)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"{TABLE} is not a Parquet table" in done.stderr


def test_data_that_turns_out_broken_is_one_line_and_leaves_no_row(environment: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{no\n")
    done = vramcalc(*NANO, "--data", str(broken), "--out", str(tmp_path / "out"), environment=environment)
    assert done.returncode == 2
    assert "broken.jsonl" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / TABLE).exists()


def test_on_a_terminal_of_60_columns_a_bar_shows_the_point_and_the_time_left(
    environment: dict[str, str], tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *NANO, "--batch", "1,2,3", "--out", str(tmp_path)],
        env=environment | {"TERM": "xterm"}, stdout=subprocess.PIPE, stderr=theirs, text=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the terminal is gone when the process is
        pass
    os.close(ours)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line for line in re.split(r"[\r\n]+", text) if "/3" in line]
    assert any("1/3" in line and "nano, 2 x 64" in line and "left" in line for line in lines)
    assert max(len(line) for line in lines) <= 60
    assert len(stdout.splitlines()) == 4
