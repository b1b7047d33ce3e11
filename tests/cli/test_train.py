"""``vramcalc train`` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-c", "from vramcalc.main import run; run()", "train"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "story.jsonl"
    lines = [
        {"prompt": f"Question {i}?", "completion": " ".join(f"{i * j % 97}" for j in range(40))} for i in range(80)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def environment(home: Path, columns: int = 60) -> dict[str, str]:
    return os.environ | {
        "XDG_CACHE_HOME": str(home),
        "XDG_DATA_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": str(columns),
    }


def train(home: Path, *arguments: str, columns: int = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=environment(home, columns), capture_output=True, text=True, timeout=240
    )


def flags(data: Path, out: Path, *more: str) -> list[str]:
    small = [
        "--model",
        "nano",
        "--precision",
        "fp32",
        "--seq",
        "16",
        "--batch",
        "2",
        "--samples",
        "8",
        "--epochs",
        "2",
        "--learning-rate",
        "1e-3",
    ]
    return [*small, "--data", str(data), "--out", str(out), *more]


@pytest.fixture(scope="module")
def trained(
    home: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A training's directory, and what its process said."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, train(home, *flags(data, out), columns=80)


@pytest.mark.slow
def test_a_training_prints_a_summary_and_predicted_against_measured_and_is_read_when_run_again(
    in_process: Callable[..., Any], home: Path, data: Path, trained: tuple[Path, Any]
) -> None:
    out, done = trained
    assert done.returncode == 0, done.stderr
    assert "Trained nano for 8 steps (2 epochs of 8 sequences, 256 tokens) of story.jsonl" in done.stdout
    for quantity in ("peak allocated", "step time", "checkpoint", "training time"):
        assert quantity in done.stdout
    assert "expected: " in done.stderr and "step 8/8" in done.stderr
    assert "Traceback" not in done.stderr and "USDT" not in done.stderr and "it/s" not in done.stderr

    narrow = in_process("train", *flags(data, out), environment=environment(home, columns=60))
    assert (narrow.returncode, narrow.stdout.splitlines()[0]) == (0, done.stdout.splitlines()[0])
    assert max(map(len, narrow.stdout.split("\n\n")[1].splitlines())) <= 60
    again = in_process("train", *flags(data, out, "--json"))
    assert again.returncode == 0, again.stderr
    document = json.loads(again.stdout)
    assert document["schema"] == "vramcalc/train/1"
    assert document == json.loads((out / "result.json").read_text())
    assert (document["steps"], document["setup"]["model"], document["data"]) == (8, "nano", "story.jsonl")
    checkpoint = next(row for row in document["comparisons"] if row["quantity"] == "checkpoint")
    assert checkpoint["measured"] == sum(file.stat().st_size for file in (out / document["last_checkpoint"]).iterdir())


@pytest.mark.slow
def test_the_report_reads_what_a_training_wrote(trained: tuple[Path, Any]) -> None:
    from reports.training import parse_training

    out, _ = trained
    log, result = (out / "training_log.jsonl").read_text(), (out / "result.json").read_text()
    training = parse_training(log, result, name="run")
    assert (len(training.train), len(training.evaluation)) == (8, 2)
    assert training.best is not None and training.best.loss == json.loads(result)["best_evaluation_loss"]


@pytest.mark.slow
def test_an_interrupted_training_says_where_it_goes_on_and_exits_with_130(
    home: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, *flags(data, out, "--epochs", "500")], env=environment(home), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoint-*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    saved = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert errors.endswith(f"the same command goes on from {out}/checkpoint-{saved}\n")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "nano-typo"], 2, "error: model: 'nano-typo' is not in the catalog"),
        (["--batch", "0"], 2, "error: batch: 0 is too small; write --batch 1 or more"),
        (["--epochs", "0"], 2, "error: epochs: 0 is too small; write --epochs 1 or more"),
        (["--learning-rate", "-1"], 2, "error: learning_rate: -1.0 is not a rate"),
        (["--samples", "many"], 2, "error: samples: 'many' is not a number I can read"),
        (["--samples", "1e9"], 2, "sequences of 16 tokens, not 1000000000; write --samples"),
        (["--data", "missing.csv"], 2, "error: data: no file 'missing.csv'"),
        (["--prompt-format", "haiku"], 2, "write --prompt-format with one of chat, alpaca, plain"),
        (["--out", "/proc/run"], 2, "error: out: cannot write to /proc/run"),
        (["--gpus", "9999"], 4, "not 9999; write --gpus"),
        (["--gpus", "2", "--sharding", "zero1"], 2, "sharding: zero1 can be estimated but not run here"),
        (["--model", "5e6"], 2, "error: model: 5e6 names no model that can be built; write --model NAME"),
        (["--gpu", "no-such-card"], 2, "error: accelerator: "),
        (["--calibration", "missing.json"], 2, "missing.json"),
        (["--model", "llama-3.1-70b"], 3, "error: memory: a step needs"),
        (["--no-such-flag"], 2, "No such option"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_an_exit_code_and_leaves_no_directory(
    in_process: Callable[..., Any],
    home: Path,
    data: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    done = in_process("train", *flags(data, tmp_path / "run", *arguments), environment=environment(home))
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_help_loads_no_torch(home: Path) -> None:
    code = (
        "import sys\nfrom vramcalc.main import run\n"
        "try:\n    run(['train', '--help'])\nexcept SystemExit as end:\n    assert end.code in (0, None)\n"
        "print([name for name in ('torch', 'transformers', 'pandas', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(home))
    assert done.stdout.endswith("[]\n"), done.stderr
    assert "--learning-rate" in done.stdout and "--restart" in done.stdout
