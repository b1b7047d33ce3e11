"""Trains in processes that a test can kill. Imports once and forks, since the imports take longer than the trainings.

Reads a plan as JSON from each line of stdin; answers with the process's id, and with its exit code (negative: the signal).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import peft  # noqa: F401
import tokenizers  # noqa: F401
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import harness.fine_tune_trainer
from estimator.setup import Setup
from harness.plan import TrainPlan
from harness.train import train


def run(line: str) -> None:
    given = json.loads(line)
    paths = {name: Path(given.pop(name)) for name in ("out", "cache")}
    train(TrainPlan(setup=Setup(**given.pop("setup")), **paths, **given))


def main() -> None:
    assert harness.fine_tune_trainer
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(line)
            sys.stdout.flush()
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
