"""Why a process that trained gave no answer: out of memory, or something else; in one line."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.fork_server import Limits

# What libraries say as an allocation fails; torch's CPU allocator, the kernel, C++, CUDA, cuBLAS, oneDNN, OpenMP.
_OUT_OF_MEMORY = (
    "defaultcpuallocator", "not enough memory", "cannot allocate memory", "std::bad_alloc", "out of memory", "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed", "unable to allocate", "could not create a memory", "failed to allocate", "thread creation failed",
    "memoryerror",
)  # fmt: skip
_ENFORCE = re.compile(r"^\[enforce fail at [^]]*\] err == 0\. ")
"""What torch's CPU allocator puts before its message."""
_LOG_TAIL_BYTES = 4096


def explain_error(error: BaseException) -> tuple[str, str]:
    """(outcome, reason) of an exception: ``oom`` where it says that memory ran out, else ``failed``."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines:
        lines[0] = _ENFORCE.sub("", lines[0])
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    no_memory = (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and says_out_of_memory(str(error)))
    )
    return ("oom" if no_memory else "failed"), reason


def says_out_of_memory(text: str) -> bool:
    lowered = text.lower()
    return any(phrase in lowered for phrase in _OUT_OF_MEMORY)


def explain_death(status: int, log: Path, *, kills_before: int | None, limits: Limits) -> tuple[str, str]:
    """(outcome, reason) of a process that ended without an answer, from its wait status and the end of its log."""
    last = last_line(log)
    said = f": {last}" if last else ""
    if not os.WIFSIGNALED(status):
        outcome = "oom" if says_out_of_memory(last) else "failed"
        return outcome, f"ended with exit code {os.waitstatus_to_exitcode(status)} and no result{said}"
    number = os.WTERMSIG(status)
    if number == signal.SIGKILL:
        kills = oom_kills()
        if kills_before is not None and kills is not None and kills > kills_before:
            return "oom", "killed by the kernel, which had run out of memory"
        return "failed", "killed (SIGKILL) by something other than the kernel's out-of-memory killer"
    name = signal.Signals(number).name
    # A C++ library that cannot allocate may abort, or write through the null pointer.
    if limits.memory_bytes is not None and says_out_of_memory(last):
        return "oom", f"ended by {name}{said}"
    return "failed", f"ended by {name}{said}"


def last_line(log: Path) -> str:
    """The last line that says something, or an empty string."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - _LOG_TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    # The profiler reports its own start and end on stderr.
    spoken = [line.strip() for line in lines if line.strip() and not line.startswith("USDT:")]
    return spoken[-1] if spoken else ""


def oom_kills() -> int | None:
    """Processes that the kernel has killed for memory since it started, in this container or host; ``None`` if unknown."""
    for file, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        try:
            counts = dict(line.split() for line in Path(file).read_text().splitlines())
            return int(counts[key])
        except (OSError, KeyError, ValueError):
            continue
    return None
