"""The fork server: answers, errors and deaths of a child, its limits, and that nothing outlives the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from estimator.errors import InputError, MissingError
from estimator.units import parse_bytes
from harness import child_errors
from harness.fork_server import CallEndedError, ForkServer, Limits
from profiler.store import read_runs

GENEROUS = Limits(timeout_seconds=120)
GIB = 2**30


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_every_call_has_a_process_of_its_own(server: ForkServer, log: Path) -> None:
    first, second = (server.call(os.getpid, limits=GENEROUS, log=log) for _ in range(2))
    assert len({first, second, os.getpid()}) == 3
    assert not psutil.pid_exists(first) and not psutil.pid_exists(second)


def test_a_call_starts_in_well_under_a_second_once_the_imports_are_done(server: ForkServer, log: Path) -> None:
    server.call(os.getpid, limits=GENEROUS, log=log)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        server.call(os.getpid, limits=GENEROUS, log=log)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.3


def test_the_server_has_imported_torch_and_has_neither_threads_nor_a_gpu(server: ForkServer, log: Path) -> None:
    modules = server.call(eval, "sorted(__import__('sys').modules)", limits=GENEROUS, log=log)
    assert {"torch", "transformers.trainer", "peft", "torch._dynamo", "harness.point"} <= set(modules)
    assert psutil.Process(server._process.pid).num_threads() == 1
    assert server.call(eval, "__import__('torch').cuda.is_initialized()", limits=GENEROUS, log=log) is False


def test_without_preloading_a_child_imports_for_itself(log: Path) -> None:
    with ForkServer(preload=False) as server:
        loaded = "'colorsys' in __import__('sys').modules, 'torch' in __import__('sys').modules"
        assert server.call(eval, loaded, limits=GENEROUS, log=log) == (False, False)
        assert server.call(eval, "bool(__import__('colorsys'))", limits=GENEROUS, log=log)
        assert server.call(eval, loaded, limits=GENEROUS, log=log) == (False, False), "another child"


def test_a_childs_bad_input_is_bad_input_here(server: ForkServer, log: Path) -> None:
    with pytest.raises(InputError, match="size: 'many' is not a number"):
        server.call(parse_bytes, "many", "size", limits=GENEROUS, log=log)
    with pytest.raises(InputError, match=r"cannot read .*none\.csv"):
        server.call(read_runs, Path("none.csv"), limits=GENEROUS, log=log)


@pytest.mark.parametrize(
    ("function", "arguments", "outcome", "reason"),
    [
        (int, ("x",), "failed", "ValueError: invalid literal for int() with base 10: 'x'"),
        (os.abort, (), "failed", "ended by SIGABRT"),
        (os._exit, (3,), "failed", "ended with exit code 3 and no result"),
        (signal.raise_signal, (signal.SIGSEGV,), "failed", "ended by SIGSEGV"),
        (
            signal.raise_signal,
            (signal.SIGKILL,),
            "failed",
            "killed (SIGKILL) by something other than the kernel's out-of-memory killer",
        ),
    ],
)
def test_a_child_that_crashes_is_an_outcome_with_a_reason(
    server: ForkServer, log: Path, function: object, arguments: tuple[object, ...], outcome: str, reason: str
) -> None:
    with pytest.raises(CallEndedError) as raised:
        server.call(function, *arguments, limits=GENEROUS, log=log)  # type: ignore[arg-type]
    assert (raised.value.outcome, str(raised.value)) == (outcome, reason)
    assert server.call(abs, -1, limits=GENEROUS, log=log) == 1  # and the next call is as good as ever


def test_a_child_that_hangs_is_killed_at_its_time_limit(server: ForkServer, log: Path) -> None:
    server.call(abs, 1, limits=GENEROUS, log=log)
    started = time.monotonic()
    with pytest.raises(CallEndedError, match=r"took longer than 0\.5 s") as raised:
        server.call(time.sleep, 600, limits=Limits(timeout_seconds=0.5), log=log)
    assert raised.value.outcome == "timeout"
    assert time.monotonic() - started < 5


def test_more_memory_than_the_limit_is_oom_and_less_is_fine(server: ForkServer, log: Path) -> None:
    limits = Limits(timeout_seconds=60, memory_bytes=GIB)
    assert server.call(eval, "len(bytes(2**29))", limits=limits, log=log) == GIB // 2
    with pytest.raises(CallEndedError) as raised:
        server.call(bytearray, 2 * GIB, limits=limits, log=log)
    assert (raised.value.outcome, str(raised.value)) == ("oom", "MemoryError")


def test_an_answer_that_does_not_fit_in_memory_is_oom_and_one_that_does_not_pickle_a_failure(
    server: ForkServer, log: Path
) -> None:
    with pytest.raises(CallEndedError, match="exit code 1 and no result: MemoryError") as raised:
        server.call(bytes, 900 * 2**20, limits=Limits(timeout_seconds=60, memory_bytes=GIB), log=log)
    assert raised.value.outcome == "oom"
    with pytest.raises(CallEndedError, match=r"exit code 1 and no result: .*pickle") as raised:
        server.call(eval, "lambda: 1", limits=GENEROUS, log=log)
    assert raised.value.outcome == "failed"


def test_torchs_own_failure_to_allocate_is_oom(server: ForkServer, log: Path) -> None:
    code = "__import__('torch').ones(2**31, dtype=__import__('torch').uint8)"
    with pytest.raises(CallEndedError, match="RuntimeError: DefaultCPUAllocator: can't allocate memory") as raised:
        server.call(eval, code, limits=Limits(timeout_seconds=60, memory_bytes=GIB), log=log)
    assert raised.value.outcome == "oom"


def test_what_a_child_prints_goes_to_its_log(server: ForkServer, log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.call(print, "a word from the child", limits=GENEROUS, log=log)
    with pytest.raises(CallEndedError):
        server.call(eval, "1 / 0", limits=GENEROUS, log=log.with_name("second"))
    assert log.read_text() == "a word from the child\n"
    assert "ZeroDivisionError: division by zero" in log.with_name("second").read_text()
    assert capfd.readouterr() == ("", "")


PARENT = """
import sys, time
from pathlib import Path
from harness.fork_server import ForkServer, Limits
server = ForkServer()
server.call(abs, 1, limits=Limits(timeout_seconds=60), log=Path(sys.argv[1]))
print(server._process.pid, flush=True)
server.call(time.sleep, 600, limits=Limits(timeout_seconds=600), log=Path(sys.argv[1]))
"""


def test_a_parent_that_is_killed_takes_server_and_child_with_it(log: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(log)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        server = psutil.Process(int(parent.stdout.readline()))
        deadline = time.monotonic() + 30
        while not (children := server.children()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(children) == 1
        parent.kill()
        _, alive = psutil.wait_procs([server, *children], timeout=10)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_server_that_has_gone_is_an_outcome_and_not_a_hang(log: Path) -> None:
    with ForkServer() as server:
        server._process.kill()
        server._process.wait()
        with pytest.raises(CallEndedError, match="the process that starts points has ended"):
            server.call(abs, 1, limits=GENEROUS, log=log)


def test_without_torch_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"training needs torch; pip install 'vramcalc-toolkit\[all\]'"):
        ForkServer()


def test_a_kill_while_the_kernel_counted_one_for_memory_is_oom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_errors, "oom_kills", lambda: 8)
    killed = signal.SIGKILL.value  # a wait status's low bits are the signal
    outcome, reason = child_errors.explain_death(killed, tmp_path / "none", kills_before=7, limits=GENEROUS)
    assert (outcome, reason) == ("oom", "killed by the kernel, which had run out of memory")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (MemoryError(), "oom"),
        (OSError(12, "Cannot allocate memory"), "oom"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "oom"),
        (RuntimeError("could not create a memory object"), "oom"),
        (RuntimeError("shape '[2]' is invalid"), "failed"),
        (ValueError("out of memory"), "failed"),
        (OSError(28, "No space left on device"), "failed"),
    ],
)
def test_only_what_says_that_memory_ran_out_is_oom(error: Exception, outcome: str) -> None:
    assert child_errors.explain_error(error)[0] == outcome


def test_cudas_out_of_memory_error_is_oom() -> None:
    import torch

    outcome, reason = child_errors.explain_error(torch.OutOfMemoryError("CUDA out of memory.\nMore lines"))
    assert (outcome, reason) == ("oom", "OutOfMemoryError: CUDA out of memory.")
