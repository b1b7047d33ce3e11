"""Ranks are started together and end together, whatever ends one of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estimator.errors import InputError, RankError
from harness.launch import launch


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions that fresh processes run; they import them by this name."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import rank_functions

    return rank_functions


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def ended_with(call: Callable[[], None]) -> tuple[BaseException | None, float]:
    began = time.monotonic()
    try:
        call()
    except BaseException as error:
        return error, time.monotonic() - began
    return None, time.monotonic() - began


def test_each_rank_says_what_torchrun_would_tell_it_and_messages_arrive(ranks: Any) -> None:
    told: list[Any] = []
    launch(ranks.tell, "word", ranks=2, on_message=told.append)
    assert sorted((message["rank"], message["RANK"], message["word"]) for message in told) == [
        (0, "0", "word"),
        (1, "1", "word"),
    ]
    assert len({message["MASTER_PORT"] for message in told}) == 1 and told[0]["WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("input", InputError, "seq: too long"),
        ("memory", MemoryError, "rank 1: RuntimeError: CUDA out of memory"),
        ("killed", RankError, "rank 1: ended by SIGKILL"),
        ("bug", RankError, "rank 1: ZeroDivisionError: division by zero"),
    ],
)
def test_what_ends_one_rank_ends_all_with_its_reason(ranks: Any, how: str, kind: type, message: str) -> None:
    """Rank 0 waits for ever, or complains a moment earlier of the connection that it has lost."""
    processes: list[int] = []
    error, _ = ended_with(lambda: launch(ranks.end, how, ranks=2, on_message=processes.append))
    assert type(error) is kind and message in str(error)
    assert len(processes) == 2 and not any(map(is_alive, processes))


def test_an_interrupt_leaves_no_process_behind(ranks: Any) -> None:
    processes: list[int] = []

    def hear(process: int) -> None:
        processes.append(process)
        if len(processes) == 2:
            raise KeyboardInterrupt

    error, seconds = ended_with(lambda: launch(ranks.end, "wait", ranks=2, on_message=hear))
    assert isinstance(error, KeyboardInterrupt) and seconds < 30
    assert not any(map(is_alive, processes))
