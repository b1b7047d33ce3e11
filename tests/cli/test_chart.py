"""``vramcalc chart`` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HEAVY = {"torch", "transformers", "pandas", "scipy", "matplotlib", "numpy", "rich"}


def chart(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vramcalc", "chart", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_without_flags_it_prints_the_default_chart() -> None:
    done = chart()
    assert (done.returncode, done.stderr) == (0, "")
    assert "full bf16-mixed" in done.stdout and "406B" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_file_gets_the_format_that_its_name_says(tmp_path: Path) -> None:
    starts = {
        "c.svg": "<svg",
        "c.md": "Memory that",
        "c.csv": "parameters,model",
        "c.json": "{",
        "c.txt": "Memory that",
    }
    for name, start in starts.items():
        done = chart("--params", "1e9,8e9", "--method", "lora", "--out", str(tmp_path / name))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (tmp_path / name).read_text().startswith(start), name
    document = json.loads((tmp_path / "c.json").read_text())
    assert document == json.loads(chart("--params", "1e9,8e9", "--method", "lora", "--json").stdout)


def test_published_compares_at_the_settings_that_are_given() -> None:
    document = json.loads(chart("--published", "--seq", "2048", "--format", "json").stdout)
    assert document["schema"] == "vramcalc/published-chart/1" and len(document["cells"]) == 49
    older = json.loads(chart("--published", "--edition", "2024-01", "--json").stdout)
    assert older["cells"][0]["published_bytes"] == 160 * 10**9


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format", "pdf"], ["--json", "--format", "csv"], ["--edition", "2024-01"], ["--published", "--edition", "1999"],
        ["--published", "--method", "lora"], ["--published", "--seq", "1,2"], ["--published", "--format", "svg"],
        ["--out", "/no/such/directory/chart.svg"], ["--model", "no-such-model"], ["--seq", "512,,1024"], ["--seq", "0"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_input_is_one_clear_line_and_exit_code_2(in_process: Callable[..., Any], arguments: list[str]) -> None:
    done = in_process("chart", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_chart_loads_nothing_heavy() -> None:
    code = (
        "import sys, vramcalc.main\n"
        "try: vramcalc.main.run(['chart', '--out', '/dev/null', '--format', 'svg'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(' '.join({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not set(done.stdout.split()) & HEAVY
