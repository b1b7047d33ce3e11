"""What earlier versions of transformers copied of the logits, in the dry run and in the formula."""

from __future__ import annotations

import pytest

from estimator.dryrun.run import dry_run
from estimator.measured import from_row
from estimator.memory.formula import peak_bytes
from estimator.model.catalog import resolve_model
from estimator.setup import Setup

# Long and narrow: the logits are the peak.
SETUP = {"model": "llama-3.2-1b", "method": "lora", "precision": "bf16", "accelerator": "A100-SXM-80GB", "seq": 2048, "batch": 2, "checkpointing": "full"}  # fmt: skip


def peak(copies: str) -> int:
    return dry_run(Setup(logit_copies=copies, **SETUP)).peak_allocated_bytes


def test_each_version_holds_what_its_code_copies() -> None:
    """At the end of the forward pass: half logits with an fp32 copy, the shifted copy and the log-softmax, 14 B a logit;
    without the half, 12 B; and the present code's peak is in backward, 12 B."""
    logits = 4096 * resolve_model("llama-3.2-1b").vocab
    newest, between, before = peak("none"), peak("shifted-and-half"), peak("shifted")
    assert between - before == pytest.approx(2 * logits, rel=0.01)
    assert before - newest == pytest.approx(0, abs=0.1 * logits)


@pytest.mark.parametrize("copies", ["none", "shifted", "shifted-and-half"])
def test_the_formula_says_the_same(copies: str) -> None:
    setup = Setup(logit_copies=copies, **SETUP).resolved()
    assert peak_bytes(resolve_model(setup.model), setup) == pytest.approx(peak(copies), rel=0.02)


@pytest.mark.parametrize(
    ("version", "copies"),
    [("4.45.2", "shifted"), ("4.46.0", "shifted-and-half"), ("4.49.1", "shifted-and-half"), ("4.50.0", "none"), ("5.23.0", "none"), ("", "none")],
)  # fmt: skip
def test_a_tables_version_says_which(version: str, copies: str) -> None:
    assert from_row({"run": "r", "model": "nano", "transformers": version}).setup.logit_copies == copies
