"""A process that has imported everything training needs, and forks a fresh child from there for each call.

Importing torch and transformers takes some four seconds, forking 20 ms. The server touches no accelerator and starts
no threads, so a child is as clean as a process of its own. multiprocessing's forkserver would do, but there a child
outlives a parent that was killed: it holds the very pipe by which the server would notice.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import pickle
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from estimator.errors import InputError, MissingError
from harness.child_errors import explain_death, explain_error, oom_kills

# Modules that a point imports on its way; what is not installed is left for the point to complain about.
_PRELOADED = (
    "torch", "torch._dynamo", "torch.profiler", "numpy", "safetensors.torch", "tokenizers", "accelerate", "peft", "transformers",
    "transformers.trainer", "transformers.models.qwen2.modeling_qwen2", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto", "transformers.integrations", "harness.trainer", "harness.data", "harness.token_dataset",
    "harness.point", "harness.torch_loop", "profiler.environment",
)  # fmt: skip
_NEEDED = ("torch", "transformers", "accelerate", "tokenizers", "safetensors")

_QUIET = {
    # No thread pools before the fork, and no look at a GPU through CUDA: either would not survive in the child.
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "KINETO_LOG_LEVEL": "5",
    # Threads that wait asleep: with the default, libgomp's spin, and a step beside one busy process takes five times as long.
    "OMP_WAIT_POLICY": "passive",
}
_ENDING_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one call may use."""

    timeout_seconds: float
    """From the fork to the answer."""
    memory_bytes: int | None = None
    """Private memory beyond what the imported libraries hold; more makes an allocation fail. ``None``: no limit."""


class CallEndedError(RuntimeError):
    """A call that gave no answer: ``outcome`` is ``oom``, ``failed`` or ``timeout``, the message the reason in one line."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    limits: Limits
    log: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    """``outcome`` is ``ok``, ``input``, ``missing`` or that of a CallEndedError."""

    outcome: str
    value: Any = None
    reason: str = ""


class ForkServer:
    """Calls functions in fresh processes, one at a time; a context manager. Children end with it, however it ends.

    Starting does not wait for the imports; the first call does. Without ``preload`` every child imports for itself: slower,
    and for machines on which a library looks at the GPU as it is imported, which no child of it survives. Raises
    MissingError where torch or transformers is not installed.
    """

    def __init__(self, *, preload: bool = True) -> None:
        for name in _NEEDED:
            if importlib.util.find_spec(name) is None:
                raise MissingError(f"training needs {name}; pip install 'vramcalc-toolkit[all]'")
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.fork_server", str(theirs.fileno()), str(int(preload))],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_QUIET | dict(os.environ) | {"PYTHONPATH": path} | _one_gpu(os.environ),
                start_new_session=True,  # a Ctrl-C is this process's to answer
            )
        self._connection: Connection[_Request, _Reply] = Connection(ours.detach())

    def call(self, function: Callable[..., Any], *arguments: Any, limits: Limits, log: Path) -> Any:
        """``function(*arguments)`` in a process of its own; both must be importable there, and the answer must pickle.

        What it prints goes to ``log``. Its InputError and MissingError are raised here; anything else that keeps it from
        answering is a CallEndedError.
        """
        try:
            self._connection.send(_Request(function=function, arguments=arguments, limits=limits, log=str(log)))
            reply = self._connection.recv()
        except (EOFError, OSError):
            raise CallEndedError("failed", "the process that starts points has ended; start again") from None
        if reply.outcome == "input":
            raise InputError(reply.reason)
        if reply.outcome == "missing":
            raise MissingError(reply.reason)
        if reply.outcome != "ok":
            raise CallEndedError(reply.outcome, reply.reason)
        return reply.value

    def close(self) -> None:
        """Ends the server, and with it a child that still runs."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _one_gpu(environment: Mapping[str, str]) -> dict[str, str]:
    """The first GPU alone, counted as NVML does: Trainer splits each batch over all that it sees."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": first}


def die_with(parent: int) -> None:
    """This process gets SIGKILL when its parent ends; at once if that has happened. Linux only: elsewhere it is left."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _serve(connection: Connection[_Reply, _Request], *, preload: bool) -> None:
    for name in _PRELOADED if preload else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # What is imported stays: a collection in a child need not look at half a million objects (0.3 s each time), nor
    # write to, and so copy, the pages that they are on.
    gc.collect()
    gc.freeze()
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(_run(request, connection))


def _run(request: _Request, connection: Connection[_Reply, _Request]) -> _Reply:
    """Forks, waits for the answer or the end of the time, and says what came of it."""
    deadline = time.monotonic() + request.limits.timeout_seconds
    kills_before = oom_kills()
    server = os.getpid()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            connection.close()
            _become_child(request, server)
            answer = pickle.dumps(_answer(request))
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
            code = 0
        except BaseException:
            traceback.print_exc()  # into the log, of which the server reads the end
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # no destructors of a process that was measured and is done
    os.close(writer)
    answer, in_time = _read_until(reader, deadline)
    os.close(reader)
    if not in_time:
        _kill(child)
        return _Reply(outcome="timeout", reason=f"took longer than {request.limits.timeout_seconds:g} s")
    status = _wait(child)
    if answer:
        reply = pickle.loads(answer)  # of our own child
        assert isinstance(reply, _Reply)
        return reply
    outcome, reason = explain_death(status, Path(request.log), kills_before=kills_before, limits=request.limits)
    return _Reply(outcome=outcome, reason=reason)


def _become_child(request: _Request, server: int) -> None:
    die_with(server)
    os.setsid()
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    with contextlib.suppress(OSError):
        # Where the machine runs out of memory, this process is the one to go.
        Path("/proc/self/oom_score_adj").write_text("1000")
    if request.limits.memory_bytes is not None:
        allowed = _data_bytes() + request.limits.memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def _data_bytes() -> int:
    """Private writable memory of this process, which is what RLIMIT_DATA limits; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 0


def _answer(request: _Request) -> _Reply:
    try:
        return _Reply(outcome="ok", value=request.function(*request.arguments))
    except InputError as error:
        return _Reply(outcome="input", reason=str(error))
    except MissingError as error:
        return _Reply(outcome="missing", reason=str(error))
    except BaseException as error:
        traceback.print_exc()  # into the log
        outcome, reason = explain_error(error)
        return _Reply(outcome=outcome, reason=reason)


def _read_until(reader: int, deadline: float) -> tuple[bytes, bool]:
    """Everything until the other end closes, and whether that was in time."""
    chunks: list[bytes] = []
    while True:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([reader], [], [], max(left, 0))
        if not ready:
            return b"", False
        chunk = os.read(reader, 2**16)
        if not chunk:
            return b"".join(chunks), True
        chunks.append(chunk)


def _wait(child: int) -> int:
    """The status of a child that is about to end; one that does not is killed."""
    deadline = time.monotonic() + _ENDING_SECONDS
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.002)
    return _kill(child)


def _kill(child: int) -> int:
    """The child and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    die_with(os.getppid())
    from harness import fork_server  # requests name its classes so, not __main__'s

    fork_server._serve(Connection(int(sys.argv[1])), preload=sys.argv[2] == "1")
