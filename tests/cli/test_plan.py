"""``vramcalc plan`` as a user meets it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from estimator.dryrun.run import dry_run
from estimator.fits import fits_by_dry_run
from estimator.setup import Setup
from estimator.units import GIB

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


@pytest.fixture(scope="module")
def one_card() -> dict[str, Any]:
    """A search for one device, which the dry run judges by default."""
    return plans_of(f"{ONE_CARD} --seq 512 --global-batch 4 --samples 1000")


def test_the_largest_batch_of_the_3090_is_the_one_that_was_seen(one_card: dict[str, Any]) -> None:
    """The formula alone says one more."""
    assert one_card["largest"]["batch"] == 7
    assert one_card["plans"] and all(found["setup"]["batch"] <= 7 for found in one_card["plans"])


def test_the_command_of_one_device_fits_by_its_own_dry_run(one_card: dict[str, Any]) -> None:
    words = one_card["plans"][0]["command"].split()
    flags = [*words[2 : words.index("--samples")], "--reserve", "2GiB", "--dry-run", "--check"]
    done = subprocess.run([sys.executable, "-m", "vramcalc", "estimate", *flags], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("seq", "batch"), [(512, 7), (2048, 1)])
def test_one_sequence_more_than_was_seen_does_not_fit(seq: int, batch: int) -> None:
    setup = Setup(
        model="qwen1.5-0.5b", precision="fp16-mixed", optimizer="adamw", seq=seq, batch=batch, accelerator="rtx-3090"
    )
    assert fits_by_dry_run(setup, reserve_bytes=2 * GIB)
    assert not fits_by_dry_run(dataclasses.replace(setup, batch=batch + 1), reserve_bytes=2 * GIB)


def test_micro_batches_after_the_second_leave_the_peak_as_it_is() -> None:
    """Why a plan's dry run has no more of them."""
    setup = Setup(model="nano-llama", seq=128, precision="fp16-mixed", accelerator="rtx-3090", accumulation=2)
    two, five = (dry_run(dataclasses.replace(setup, accumulation=count)) for count in (2, 5))
    assert (two.peak_allocated_bytes, two.peak_reserved_bytes) == (five.peak_allocated_bytes, five.peak_reserved_bytes)


@pytest.mark.parametrize(
    "arguments",
    [
        "--model qwen1.5-0.5b --gpu rtx-3090 --gpus 1 --samples 1000 --epochs 2 --no-dry-run",
        "--model llama-3.1-8b --gpu h100 --gpus 1,8 --method lora,qlora --dataset-tokens 1e8 --no-dry-run",
        "--model mixtral-8x7b --gpu h100 --gpus 64 --dataset-tokens 1e9",
        "--model llama-3.1-405b --gpu h100 --gpus 16384 --seq 8192 --dataset-tokens 15.6T",
        "--model qwen2.5-7b --gpu a100 --gpus 8 --seq 32768 --dataset-tokens 1e9 --epochs 1.5",
    ],
)
def test_the_command_line_understands_the_command_of_every_plan(arguments: str) -> None:
    import typer

    from vramcalc.main import make_app

    commands: Any = typer.main.get_command(make_app("train"))
    train = commands.commands["train"]
    document = plans_of(arguments)
    assert document["plans"]
    for found in document["plans"]:
        train.make_context("train", found["command"].split()[2:])


def test_methods_that_do_not_fit_are_named_beside_those_that_do() -> None:
    arguments = "--params 13e9 --gpu rtx-3090 --gpus 1 --method full,lora,qlora --seq 1024 --samples 10000 --no-dry-run"
    document = plans_of(arguments)
    assert {found["setup"]["method"] for found in document["plans"]} == {"qlora"}
    near, far = document["misses"]
    assert {near["setup"]["method"], far["setup"]["method"]} == {"lora", "full"} and 0 < near["bytes"] < far["bytes"]
    assert "does not fit: the nearest is" in run_plan(arguments).stdout.replace("\n  ", " ")


def test_an_accelerator_whose_memory_is_only_expected_is_planned_with_the_least_of_it() -> None:
    from estimator.hardware import find_accelerator

    arguments = "--model qwen3-8b --gpu a40 --gpus 8 --samples 10000 --price 0.5"
    device = find_accelerator("a40")
    assert device.usable_is_expected and device.usable_low_bytes is not None
    for found in plans_of(arguments)["plans"]:
        assert found["memory"]["peak_device_bytes"]["value"] <= device.usable_low_bytes
    assert "no source states what the driver of A40 reports" in run_plan(arguments).stdout.replace("\n  ", " ")


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
        assert "--pipeline-schedule" not in words  # which the framework fills in


def test_a_narrow_terminal_breaks_no_flag_and_what_train_does_not_run_is_said() -> None:
    import os

    narrow = os.environ | {"COLUMNS": "60"}
    done = run_plan("--model llama-3-8b --gpu mi300x --gpus 8,64 --dataset-tokens 1e8", env=narrow)
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 60 for line in done.stdout.splitlines())
    commands = [text.split("\n\n")[0].split() for text in done.stdout.split("$ vramcalc train ")[1:]]
    assert commands and all(not word.endswith("-") for words in commands for word in words)
    said = "`vramcalc train` itself runs none of these plans"
    assert said in " ".join(done.stdout.split())
    one = run_plan("--model nano --gpu h100 --gpus 1 --samples 1000 --no-dry-run")
    assert one.returncode == 0 and "`vramcalc train` itself" not in " ".join(one.stdout.split())


def test_what_would_be_cheaper_and_what_the_limits_would_take_is_said() -> None:
    arguments = "--model llama-3.1-8b --gpu rtx-4090 --gpus 1 --seq 2048 --samples 1000 --no-dry-run"
    document = plans_of(arguments)
    (found,) = document["plans"]
    assert found["setup"]["offload"] and not found["trains"] and "--offload" in found["command"]
    (other,) = (other for other in document["alternatives"] if other["flags"] == "--method qlora")
    assert other["setup"]["method"] == "qlora" and other["run"]["cost_usd"]["value"] < found["run"]["cost_usd"]["value"]
    text = " ".join(run_plan(arguments + " --deadline 1m").stdout.split())
    assert "none keeps the deadline: the fastest takes" in text


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
        ("--model nano --deadline 1h", "deadline"),
        ("--model nano --gpu h100 --gpus 4,8 --max-gpus 4 --samples 100", "max_gpus"),
        ("--model nano --budget 100", "budget"),
        ("--model nano --gpu h100 --samples 100 --host-memory some", "host_memory"),
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
