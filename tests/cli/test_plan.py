"""``vramcalc plan`` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

ONE_CARD = (
    "--model qwen1.5-0.5b --gpu rtx-3090 --gpus 1 --method full --framework hf-trainer --precision fp16-mixed "
    "--optimizer adamw --attention sdpa --checkpointing none --reserve 2GiB"
)


def run_plan(arguments: str, **further: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vramcalc", "plan", *arguments.split()],
        capture_output=True,
        text=True,
        timeout=300,
        **further,
    )


def plans_of(arguments: str) -> dict[str, Any]:
    done = run_plan(arguments + " --json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.parametrize(("seq", "batch"), [(512, 7), (2048, 1)])
def test_the_largest_batches_of_the_3090_are_those_that_were_seen(seq: int, batch: int) -> None:
    """Confirmed by the dry run, as a search for one device is by default; the formula alone says one more."""
    document = plans_of(f"{ONE_CARD} --seq {seq}")
    assert document["largest"]["batch"] == batch
    assert all(found["setup"]["batch"] <= batch for found in document["plans"])


def test_the_document_has_what_a_plan_needs_and_its_command_is_understood() -> None:
    document = plans_of(
        "--model qwen2.5-1.5b --seq 2048 --gpu h100,a100 --gpus 1,2,8 --samples 10000 --epochs 3 --no-dry-run"
    )
    assert document["plans"] and set(document["largest"]) >= {"batch", "seq"}
    for found in document["plans"]:
        assert {"setup", "memory", "time", "run", "command"} <= set(found)
        assert found["run"]["cost_usd"]["value"] > 0
        words = found["command"].split()
        assert words[:2] == ["vramcalc", "train"] and words[words.index("--samples") + 1] == "10000"
        assert _setup_of(words[2:]) == found["setup"]


def _setup_of(words: list[str]) -> dict[str, Any]:
    """What ``estimate`` makes of the same flags, without those of data and place."""
    flags = words[: words.index("--samples")]
    done = subprocess.run(
        [sys.executable, "-m", "vramcalc", "estimate", *flags, "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    setup: dict[str, Any] = json.loads(done.stdout)["setup"]
    return setup


def test_where_nothing_fits_it_exits_with_3_and_names_the_nearest() -> None:
    done = run_plan("--model llama-3.1-405b --gpu rtx-3090 --gpus 1,8 --no-dry-run")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1 and "the nearest is" in done.stderr and "too large" in done.stderr
    assert "No plan" in done.stdout


def test_a_narrow_terminal_is_kept_to() -> None:
    import os

    done = run_plan("--model nano --gpu h100 --gpus 1 --samples 1000 --no-dry-run", env=os.environ | {"COLUMNS": "60"})
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 60 for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--seq 512", "model"),
        ("--model nano,micro", "model"),
        ("--model nano --deadline soon", "deadline"),
        ("--model nano --gpu cpu", "accelerator"),
        ("--model nano --gpu h1000", "accelerator"),
        ("--model nano --price 2 --provider Lambda", "price"),
        ("--model nano --method full,magic", "method"),
        ("--model nano --budget 0", "budget"),
        ("--model nano --deadline 0h", "deadline"),
        ("--model nano --owned --price 3", "owned"),
        ("--model nano --gpu h100 --gpus 1 --batch 2 --global-batch 7", "global_batch"),
    ],
)
def test_wrong_input_is_one_line(arguments: str, named: str) -> None:
    done = run_plan(arguments)
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {named}"), done.stderr


def test_a_part_of_an_epoch_is_told_to_train_in_steps() -> None:
    done = run_plan("--model nano --gpu h100 --gpus 2 --samples 1000 --epochs 1.5 --json")
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout)["plans"]:
        assert f"--samples 1000 --steps {found['run']['steps']} " in found["command"]
        assert "--epochs" not in found["command"]
