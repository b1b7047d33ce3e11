"""``vramcalc estimate --timeline`` and the remedies of ``vramcalc estimate``, as a user runs them."""

import json
import os
from pathlib import Path

import pytest

from vramcalc.main import run as vramcalc

pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SMALL = ("--model", "nano", "--seq", "128", "--gpu", "rtx-3090")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        vramcalc(["estimate", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_page_is_written_beside_the_estimate_which_is_of_a_dry_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "sub" / "timeline.html"
    code, text, said = run(capsys, *SMALL, "--timeline", out, "--json")
    assert code == 0
    assert said == f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser\n"
    document = json.loads(text)
    assert document["memory"]["method"] == "dry-run"
    held = sum(holder["bytes"] for holder in document["memory"]["holders"])
    assert held == document["memory"]["peak_allocated_bytes"]["value"]
    page = out.read_text(encoding="utf-8")
    assert "Full fine-tune of nano" in page and "model.layers.*.mlp" in page
    assert [path.name for path in out.parent.iterdir()] == ["timeline.html"]


def test_a_long_step_of_a_large_model_makes_a_page_below_a_megabyte(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "timeline.html"
    code, text, _ = run(
        capsys, "--model", "llama-3.1-8b", "--precision", "bf16", "--accumulation", "4", "--gpu", "a100", "--timeline", out
    )  # fmt: skip
    assert code == 0 and "What holds the peak" in text
    assert out.stat().st_size < 1e6


@pytest.mark.parametrize(
    ("setup", "named"),
    [(("--params", "8e9"), "params"), (("--model", "nano", "--framework", "megatron"), "framework")],
    ids=str,
)
def test_what_cannot_be_dry_run_is_refused_by_the_flag_that_was_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, setup: tuple[str, ...], named: str
) -> None:
    out = tmp_path / "timeline.html"
    code, text, said = run(capsys, *setup, "--timeline", out)
    assert (code, text) == (2, "")
    assert said.startswith(f"error: {named}: ") and said.endswith("leave out --timeline\n") and said.count("\n") == 1
    assert not out.exists()


def test_a_file_that_cannot_be_written_is_refused_before_the_dry_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    for out in (tmp_path, blocked / "timeline.html"):
        code, text, said = run(capsys, *SMALL, "--timeline", out)
        assert (code, text) == (2, "")
        assert said.startswith("error: timeline: ") and str(out) in said and said.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_without_permission_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    code, _, said = run(capsys, *SMALL, "--timeline", tmp_path / "timeline.html")
    assert code == 2 and said.startswith("error: timeline: cannot write ")


def test_what_does_not_fit_comes_with_what_would_and_the_check_still_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup = (
        "--model",
        "qwen1.5-0.5b",
        "--precision",
        "fp16-mixed",
        "--seq",
        "512",
        "--batch",
        "12",
        "--gpu",
        "rtx-3090",
    )
    code, text, said = run(capsys, *setup, "--check")
    assert code == 3 and said.startswith("error: memory: ")
    assert "\nWhat would make it fit (by the formula)\n" in text
    assert "- --checkpointing full: " in text
    code, text, _ = run(capsys, *setup, "--check", "--json")
    remedies = json.loads(text)["remedies"]
    assert code == 3 and remedies[0]["fits"] is True
    assert {"change", "flags", "peak_device_bytes", "saved_bytes", "slower", "fits", "note"} == set(remedies[0])
    # Whoever follows the first piece of advice is told that it fits.
    code, text, _ = run(capsys, *setup, "--check", *remedies[0]["flags"].split())
    assert code == 0 and "What would make it fit" not in text


def test_what_a_dry_run_finds_too_large_has_remedies_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    # The story's card and batch: the tensors would fit, the fragments do not.
    code, text, _ = run(
        capsys, "--model", "qwen1.5-0.5b", "--precision", "fp16-mixed", "--optimizer", "adamw", "--seq", "512", "--batch", "8",
        "--gpu", "rtx-3090", "--reserve", "2GiB", "--dry-run", "--json",
    )  # fmt: skip
    document = json.loads(text)
    assert code == 0 and document["fits"]["fits"] is False
    assert {"--checkpointing full", "--batch 4 --accumulation 2"} <= {
        r["flags"] for r in document["remedies"] if r["fits"]
    }
    assert next(fit for fit in document["fits_on"] if fit["gpu"] == "RTX-3090") == document["fits"]
