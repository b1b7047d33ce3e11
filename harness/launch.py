"""Starts one process for each device of this machine, and ends them together.

Started afresh (``spawn``), as CUDA asks for, each with the environment that ``torchrun`` would give it. Whatever one of them
ends with, the others are ended too, and one reason is raised here. They outlive nobody: when this process ends, however it
ends, they get SIGKILL.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from estimator.errors import DoesNotFitError, InputError, MissingError, RankError
from harness.child_errors import explain_error, oom_kills
from harness.fork_server import die_with
from harness.world import World
from profiler.device import usable_cores

_OTHERS_SECONDS = 1.0
"""After the first failure: a rank whose neighbour ran out of memory may be the first to complain, of a lost connection."""
_HOST = "127.0.0.1"
_QUIET = (("TORCH_CPP_LOG_LEVEL", "ERROR"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"))
"""What each rank would say of its own; errors are said all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    rank: int
    outcome: str
    """One of ``_GRAVITY``."""
    reason: str


_ERRORS: dict[str, type[Exception]] = {"input": InputError, "missing": MissingError, "does not fit": DoesNotFitError}
_GRAVITY = ("oom", "does not fit", "input", "missing", "killed", "failed", "lost")
"""What explains the other ranks' failures comes first."""


def launch(
    function: Callable[..., None], *arguments: Any, ranks: int, on_message: Callable[[Any], None] = lambda _: None
) -> None:
    """Runs ``function(world, send, *arguments)`` on each rank until all have returned.

    Both must be importable by a fresh process. ``send`` hands an object to ``on_message`` here. Raises what a rank raised of
    InputError, MissingError and DoesNotFitError, MemoryError where one ran out of memory, RankError for anything else.
    """
    import torch.distributed as dist

    # The port is this process's from here on, so that nobody else can take it before the ranks meet there.
    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    kills_before = oom_kills()
    started: list[tuple[BaseProcess, Connection[Any, Any]]] = []
    try:
        with _interrupts_ignored():  # which the ranks inherit: a Ctrl-C is this process's to answer
            for rank in range(ranks):
                started.append(_start(function, arguments, World(rank=rank, size=ranks, local_rank=rank), store.port))
        failures = _listen(started, on_message)
    finally:
        for process, connection in started:
            process.kill()
            process.join()
            connection.close()
    if failures:
        kills = oom_kills()
        if kills is not None and kills_before is not None and kills > kills_before:
            raise MemoryError("a rank was killed by the kernel, which had run out of memory")
        worst = min(failures, key=lambda failure: _GRAVITY.index(failure.outcome))
        if worst.outcome in _ERRORS:
            raise _ERRORS[worst.outcome](worst.reason)
        said = f"rank {worst.rank}: {worst.reason}"
        raise MemoryError(said) if worst.outcome == "oom" else RankError(said)


def _start(
    function: Callable[..., None], arguments: tuple[Any, ...], world: World, port: int
) -> tuple[BaseProcess, Connection[Any, Any]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    environment = {
        "RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.size, "LOCAL_WORLD_SIZE": world.size,
        "MASTER_ADDR": _HOST, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
    }  # fmt: skip
    told = {name: str(value) for name, value in environment.items()}
    threads = str(max(usable_cores() // world.size, 1))
    told |= {name: os.environ.get(name, value) for name, value in (("OMP_NUM_THREADS", threads), *_QUIET)}
    process = context.Process(target=_rank, args=(function, arguments, world, told, theirs, os.getpid()))
    process.start()
    theirs.close()
    return process, ours


def _rank(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    world: World,
    environment: dict[str, str],
    connection: Connection[Any, Any],
    parent: int,
) -> None:
    die_with(parent)
    os.environ |= environment  # before torch is loaded, which reads some of it once
    try:
        function(world, connection.send, *arguments)
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(_failure(world.rank, error))
        sys.stderr.flush()
        os._exit(1)  # no orderly end: it would wait for the other ranks
    connection.close()
    os._exit(0)  # nor destructors that talk to ranks which have gone


def _failure(rank: int, error: BaseException) -> _Failure:
    for outcome, kind in _ERRORS.items():
        if isinstance(error, kind):
            return _Failure(rank=rank, outcome=outcome, reason=str(error))
    outcome, reason = explain_error(error)
    if outcome == "failed" and _lost_connection(reason):
        outcome = "lost"
    elif outcome == "failed":
        import traceback

        traceback.print_exc()
    return _Failure(rank=rank, outcome=outcome, reason=reason)


def _lost_connection(reason: str) -> bool:
    """Of what gloo and NCCL say where another rank has gone."""
    return any(word in reason for word in ("Connection closed by peer", "Connection reset", "DistBackendError"))


def _listen(
    started: list[tuple[BaseProcess, Connection[Any, Any]]], on_message: Callable[[Any], None]
) -> list[_Failure]:
    """Until all ranks have ended; after a failure no longer than it takes the others to say theirs."""
    failures: list[_Failure] = []
    open_ranks = {connection: rank for rank, (_, connection) in enumerate(started)}
    deadline: float | None = None
    while open_ranks:
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        ready = wait(list(open_ranks), timeout=left)
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = open_ranks[connection]
            try:
                message = connection.recv()
            except (EOFError, OSError):
                del open_ranks[connection]
                process = started[rank][0]
                process.join()
                if process.exitcode and all(failure.rank != rank for failure in failures):
                    failures.append(_Failure(rank=rank, outcome="killed", reason=_end(process.exitcode)))
            else:
                if isinstance(message, _Failure):
                    failures.append(message)
                else:
                    on_message(message)
        if failures and deadline is None:
            deadline = time.monotonic() + _OTHERS_SECONDS
    return failures


def _end(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code} and no reason"


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
