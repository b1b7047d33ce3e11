"""The flags of a whole run, as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

H100 = ("--model", "llama-3.2-1b", "--gpu", "h100")


def estimate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vramcalc", "estimate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def run_of(*arguments: str) -> dict[str, Any]:
    done = estimate(*H100, *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return dict(json.loads(done.stdout))


def test_each_flag_of_the_run_reaches_it() -> None:
    arguments = (
        "--dataset-tokens", "1e9", "--epochs", "2", "--provider", "nebius", "--spot", "--grid-gco2", "50", "--save-every", "1000",
        "--eval-samples", "500", "--eval-every", "100000", "--disk-bandwidth", "2GB",
    )  # fmt: skip
    document = run_of(*arguments)
    run = document["run"]
    assert run["tokens"] == 2 * 10**9 and run["save_every_steps"] <= 1000
    assert run["checkpoints"] == -(-run["steps"] // 1000) and run["evaluations"] == -(-run["steps"] // 100_000)
    assert run["price_source"].startswith("spot price of Nebius") and run["grid_gco2_per_kwh"] == 50
    assert run["grid_source"] == "given" and document["budget"] is None
    written = run["checkpoints"] * document["checkpoint"]["bytes"] / 2e9 / 3600
    assert run["parts_hours"]["checkpoints"] == pytest.approx(written)


def test_a_budget_is_answered_with_tokens_and_epochs() -> None:
    budget = run_of("--budget", "$1,000", "--samples", "9846", "--price", "2.5")["budget"]
    assert budget["budget_usd"] == 1000 and budget["price_usd_per_gpu_hour"] == 2.5
    assert budget["hours"]["value"] == pytest.approx(400)
    assert budget["epochs"]["value"] == pytest.approx(budget["tokens"]["value"] / (9846 * 2048))


def test_a_budget_of_cents_is_a_budget() -> None:
    assert run_of("--budget", "0.5")["budget"]["budget_usd"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--params", "1e9", "--budget", "1000"], "--gpu NAME"),
        (["--params", "1e9", "--gpu", "v100-pcie-32gb", "--precision", "fp16-mixed", "--budget", "9"], "--price 2.50"),
        ([*H100, "--provider", "nobody", "--samples", "9"], "Lambda"),
        ([*H100, "--provider", "lambda", "--price", "2"], "not both"),
        ([*H100, "--eval-every", "5"], "--eval-samples"),
        ([*H100, "--budget", "plenty"], "budget"),
        ([*H100, "--save-every", "0"], "save_every"),
        ([*H100, "--grid-gco2", "nan"], "--grid-gco2 400"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_is_missing_or_wrong_is_one_line_that_says_what_to_write(
    in_process: Callable[..., Any], arguments: list[str], says: str
) -> None:
    done = in_process("estimate", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1 and says in done.stderr
