"""The offline instruction set: what is in it, and what must never happen while it is made."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

from harness.stdlib_corpus import corpus_path, stdlib_samples


def test_it_holds_thousands_of_distinct_docstrings(cache: Path) -> None:
    samples = stdlib_samples(cache)
    assert len(samples) > 4000
    outputs = [sample["output"] for sample in samples]
    assert len(set(outputs)) == len(outputs)
    assert min(map(len, outputs)) >= 20


def test_answers_are_the_docstrings_that_python_itself_reports(cache: Path) -> None:
    answers = {sample["output"] for sample in stdlib_samples(cache)}
    for documented in (textwrap.wrap, textwrap.TextWrapper, textwrap, json.dumps, json.JSONDecoder.decode, str.split):
        assert inspect.getdoc(documented) in answers


def test_questions_name_what_is_asked_about_in_several_wordings(cache: Path) -> None:
    samples = stdlib_samples(cache)
    about_wrap = [s["instruction"] for s in samples if s["output"] == inspect.getdoc(textwrap.wrap)]
    assert len(about_wrap) == 1 and "textwrap.wrap" in about_wrap[0]
    assert len({sample["instruction"].split()[0] for sample in samples}) >= 4


def test_a_damaged_cache_is_made_anew_the_same_in_another_process_without_importing_what_acts_on_import(
    cache: Path, tmp_path: Path
) -> None:
    """`antigravity` opens a browser, `this` prints, `turtle` and `tkinter` need a display."""
    stdlib_samples(cache)
    corpus_path(tmp_path).write_bytes(corpus_path(cache).read_bytes()[:-100])
    script = (
        "import sys\nfrom pathlib import Path\nfrom harness.stdlib_corpus import stdlib_samples\n"
        f"stdlib_samples(Path({str(tmp_path)!r}))\n"
        "print([name for name in ('antigravity', 'this', 'turtle', 'tkinter', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"}
    )
    assert done.stdout == "[]\n"
    assert corpus_path(tmp_path).read_bytes() == corpus_path(cache).read_bytes()
