"""``vramcalc validate`` as a user runs it: a table in, scores out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estimator.memory.formula import memory_phases
from estimator.model.catalog import resolve_model
from estimator.setup import Setup
from estimator.validation import SKIP_REASONS


def vramcalc(*arguments: str, home: Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_DATA_HOME": str(home), "COLUMNS": str(columns)}
    code = "from vramcalc.main import run; run()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


COLUMNS = "run,source,model,accelerator,method,precision,seq,batch,outcome,peak_allocated_bytes,step_seconds"


def formula_peak(model: str, seq: int, batch: int) -> int:
    setup = Setup(model=model, accelerator="A100-SXM-80GB", precision="bf16", seq=seq, batch=batch).resolved()
    return max(phase.bytes for phase in memory_phases(resolve_model(model), setup))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two sources: one measured what the formula says, one twice that; a 70B that ran out; rows that cannot be predicted."""
    right, wrong = formula_peak("llama-3.2-1b", 1024, 2), 2 * formula_peak("llama-3.2-1b", 512, 1)
    rows = [
        f"r1,lab: a,llama-3.2-1b,A100-SXM-80GB,full,bf16,1024,2,ok,{right},",
        f"r2,other: b,llama-3.2-1b,A100-SXM-80GB,full,bf16,512,1,ok,{wrong},0.25",
        "r3,other: b,llama-3-70b,A100-SXM-80GB,full,bf16,2048,1,oom,,",
        "r4,lab: a,llama-3.2-1b,A100-SXM-80GB,magic,bf16,1024,2,ok,1000,",
        "r5,lab: a,llama-3.2-1b,A100-SXM-80GB,full,bf16,,2,ok,1000,",
        "r6,lab: a,no-such-model,A100-SXM-80GB,full,bf16,1024,2,ok,1000,",
        "r7,lab: a,llama-3.2-1b,,full,bf16,1024,2,ok,,1.5",
    ]
    path = tmp_path / "table.csv"
    path.write_text("\n".join([COLUMNS, *rows]) + "\n")
    return path


def test_the_document_follows_the_contract(table: Path, tmp_path: Path) -> None:
    done = vramcalc("validate", str(table), "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "vramcalc/validate/1"
    assert set(document["overall"]) == {"peak_allocated", "step_seconds"}
    assert set(document["overall"]["peak_allocated"]) == {
        "n", "median_ape", "p90_ape", "p95_ape", "max_ape", "bias", "coverage_90",
    }  # fmt: skip
    assert document["by_source"]["lab"]["peak_allocated"]["max_ape"] == pytest.approx(0.0, abs=1e-6)
    assert document["by_source"]["other"]["peak_allocated"]["bias"] == pytest.approx(-0.5, abs=1e-6)
    assert document["overall"]["peak_allocated"]["median_ape"] == pytest.approx(0.25, abs=1e-6)
    assert document["fits"] == {"true_fit": 2, "false_fit": 0, "true_oom": 1, "false_oom": 0}
    rows = {row["run"]: row for row in document["rows"]}
    assert set(rows) == {"r1", "r2", "r3"}
    assert set(rows["r2"]) == {"run", "peak_allocated", "step_seconds"}
    assert rows["r2"]["step_seconds"]["measured"] == 0.25
    assert (
        rows["r1"]["peak_allocated"]["low"]
        <= rows["r1"]["peak_allocated"]["predicted"]
        <= rows["r1"]["peak_allocated"]["high"]
    )


def test_rows_that_cannot_be_predicted_are_listed_with_documented_reasons(table: Path, tmp_path: Path) -> None:
    document = json.loads(vramcalc("validate", str(table), "--json", home=tmp_path).stdout)
    reasons = {skip["run"]: skip["reason"] for skip in document["skipped"]}
    assert set(reasons) == {"r4", "r5", "r6", "r7"}
    assert reasons["r4"].startswith("unreadable row: method: 'magic'")
    assert reasons["r5"] == "not stated: seq"
    assert reasons["r6"].startswith("unknown model: ")
    assert reasons["r7"].startswith("accelerator not stated: ")
    assert {reasons[run].partition(":")[0] for run in ("r4", "r5", "r6")} <= set(SKIP_REASONS)


@pytest.mark.parametrize("columns", [60, 100])
def test_people_get_a_table_that_fits_the_terminal(table: Path, tmp_path: Path, columns: int) -> None:
    done = vramcalc("validate", str(table), home=tmp_path, columns=columns)
    assert done.returncode == 0, done.stderr
    assert "3 rows predicted, 4 skipped" in done.stdout
    assert "By source" in done.stdout and "Worst rows" in done.stdout
    assert "2 said to fit and did" in " ".join(done.stdout.split())
    assert all(len(line) <= columns for line in done.stdout.splitlines())


def test_a_calibration_counts_only_where_it_is_named(table: Path, tmp_path: Path) -> None:
    saved = tmp_path / "vramcalc" / "calibration-a100-sxm-80gb.json"
    saved.parent.mkdir()
    saved.write_text("broken")
    assert vramcalc("validate", str(table), "--json", home=tmp_path).returncode == 0
    named = vramcalc("validate", str(table), "--calibration", str(saved), home=tmp_path)
    assert named.returncode == 2
    assert f"calibration: {saved} is not JSON" in named.stderr and len(named.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot read"), ("", "has no rows"), ("x\n1\n", "has no column 'run'"), (b"\xff\xfe\x00run", "is not UTF-8")],
)  # fmt: skip
def test_a_table_that_is_none_is_one_line_and_exit_code_2(
    tmp_path: Path, content: str | bytes | None, said: str
) -> None:
    table = tmp_path / "bad.csv"
    if content is not None:
        table.write_bytes(content.encode() if isinstance(content, str) else content)
    done = vramcalc("validate", str(table), home=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_table_whose_rows_are_all_skipped_has_no_scores_and_says_so(
    in_process: Callable[..., Any], tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("run,model,accelerator\nr1,nano,cpu\nr2,nano,cpu\n")
    for flags in ((), ("--json",)):
        done = in_process("validate", str(table), *flags)
        assert done.returncode == 2
        says = f"error: table: none of the 2 rows of {table} can be predicted; the first, run r1: not stated: seq and batch\n"
        assert done.stderr == says
    assert len(json.loads(done.stdout)["skipped"]) == 2
