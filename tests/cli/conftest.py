"""A command in the process of the tests: for what does not depend on a process of its own, whose start takes longer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from vramcalc.main import run


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What ``subprocess.CompletedProcess`` would say."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs ``vramcalc`` with arguments; ``environment`` is added to the process's for the rest of the test."""

    def vramcalc(*arguments: str, environment: dict[str, str] | None = None) -> Done:
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        ended: Any
        with pytest.raises(SystemExit) as ended:
            run(arguments)
        said = capsys.readouterr()
        return Done(returncode=int(ended.value.code or 0), stdout=said.out, stderr=said.err)

    return vramcalc
