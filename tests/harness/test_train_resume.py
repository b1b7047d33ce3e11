"""A training that is killed goes on from its last checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoints import checkpoints
from harness.training_log import read_log

SCRIPT = Path(__file__).with_name("training_process.py")


def plan(out: Path, cache: Path, data: Path, **setup: Any) -> dict[str, Any]:
    """Eight steps in each of three epochs; checkpoints within and at the end of epochs, and at other steps than
    evaluations."""
    return {
        "setup": {"model": "nano", "precision": "fp32", "seq": 32, "batch": 2, "accumulation": 2, **setup},
        "out": str(out),
        "cache": str(cache),
        "data": str(data),
        "samples": 32,
        "epochs": 3,
        "learning_rate": 1e-3,
        "save_steps": 5,
        "eval_steps": 7,
        "keep": 2,
    }


class Trainings:
    """Starts trainings one after the other, each a process of its own."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._server = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def _start(self, given: dict[str, Any]) -> int:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(given) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def _exit_code(self) -> int:
        assert self._server.stdout
        return int(self._server.stdout.readline())

    def finish(self, given: dict[str, Any]) -> None:
        self._start(given)
        assert self._exit_code() == 0

    def kill_when(self, given: dict[str, Any], condition: Callable[[], bool]) -> None:
        """Starts the training and sends SIGKILL at the first moment at which ``condition`` holds."""
        process = self._start(given)
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        os.kill(process, signal.SIGKILL)
        assert self._exit_code() == -signal.SIGKILL, "it ended before it could be killed"

    def close(self) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()


@pytest.fixture(scope="module")
def trainings() -> Iterator[Trainings]:
    started = Trainings()
    yield started
    started.close()


def steps_logged(out: Path) -> int:
    try:
        return max((entry.step for entry in read_log(out / "training_log.jsonl")), default=0)
    except OSError:
        return 0


def losses(out: Path) -> list[tuple[int, str, float, float | None]]:
    return [(e.step, e.kind, e.loss, e.learning_rate) for e in read_log(out / "training_log.jsonl")]


def weights(out: Path, step: int) -> bytes:
    return (out / f"checkpoint-{step}" / "model.safetensors").read_bytes()


def same(left: Any, right: Any) -> bool:
    """Of state dicts: the same keys, and tensors equal to the last bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [{"text": f"Sample {i}: " + " ".join(f"the word {i * j % 97} of it" for j in range(12))} for i in range(80)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_a_run_killed_four_times_ends_with_the_losses_and_weights_of_one_that_was_not(
    trainings: Trainings, tmp_path: Path, cache: Path, data: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trainings.finish(plan(whole, cache, data))
    assert [step for step, kind, *_ in losses(whole) if kind == "train"] == list(range(1, 25))
    assert [step for step, kind, *_ in losses(whole) if kind == "eval"] == [7, 8, 14, 16, 21, 24]

    given = plan(killed, cache, data)
    trainings.kill_when(given, lambda: steps_logged(killed) >= 3)  # before there is any checkpoint
    trainings.kill_when(given, lambda: steps_logged(killed) >= 12)  # in the second epoch, between checkpoints
    assert checkpoints(killed)
    resumed_from = checkpoints(killed)[-1].step
    trainings.kill_when(given, lambda: steps_logged(killed) > resumed_from and (killed / ".incomplete").exists())
    assert all((c.path / "trainer_state.json").exists() for c in checkpoints(killed))
    trainings.kill_when(given, lambda: steps_logged(killed) >= 22)  # in the last epoch
    trainings.finish(given)

    assert losses(killed) == losses(whole)
    assert weights(killed, 24) == weights(whole, 24)
    assert (killed / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    states = [torch.load(out / "checkpoint-24" / "optimizer.pt", weights_only=True) for out in (whole, killed)]
    assert same(*states)
    results = [json.loads((out / "result.json").read_text()) for out in (whole, killed)]
    for name in ("final_loss", "final_evaluation_loss", "best_checkpoint", "overfit_epoch", "tokens", "steps"):
        assert results[0][name] == results[1][name]
    assert not [path.name for path in killed.iterdir() if path.name.startswith((".incomplete", ".discarded"))]
    assert {c.step for c in checkpoints(killed)} == {c.step for c in checkpoints(whole)}


@pytest.mark.slow
def test_an_adapter_in_half_precision_resumes_to_the_last_bit_too(
    trainings: Trainings, tmp_path: Path, cache: Path, data: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    setup = {"method": "lora", "precision": "bf16", "autocast": "bf16", "pack": False, "accumulation": 1}
    trainings.finish(plan(whole, cache, data, **setup) | {"samples": 16})
    given = plan(killed, cache, data, **setup) | {"samples": 16}
    trainings.kill_when(given, lambda: steps_logged(killed) >= 13)
    trainings.finish(given)
    assert losses(killed) == losses(whole)
    name = "checkpoint-24/adapter_model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
