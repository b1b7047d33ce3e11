import dataclasses
import io
import subprocess
import sys

import pytest
from rich.console import Console

from estimator.measured import MeasuredRun
from estimator.result import Estimate
from estimator.setup import Setup
from reports.comparison import Comparison
from reports.screen import Screen
from reports.terminal import describe_method, print_comparison, print_estimate, print_runs


class Terminal:
    """A console that writes to a text of its own; as in a pipe unless ``colour``."""

    def __init__(self, width: int = 80, *, encoding: str = "utf-8", colour: bool = False) -> None:
        self._file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        self.console = Console(file=self._file, width=width, force_terminal=colour, highlight=False)
        self.screen = Screen(self._file, width=width, colour=colour)

    @property
    def text(self) -> str:
        self._file.flush()
        self._file.seek(0)
        return self._file.read()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(estimate: Estimate, runs: list[MeasuredRun], width: int) -> None:
    terminal = Terminal(width)
    print_estimate(terminal.screen, estimate)
    print_runs(terminal.console, runs)
    assert max(len(line) for line in terminal.text.splitlines()) <= width


def test_a_pipe_gets_no_control_codes(estimate: Estimate) -> None:
    terminal = Terminal()
    print_estimate(terminal.screen, estimate)
    assert "\x1b" not in terminal.text


def test_an_ascii_terminal_gets_ascii(estimate: Estimate) -> None:
    terminal = Terminal(encoding="ascii")
    print_estimate(terminal.screen, estimate)
    assert "####" in terminal.text


def test_an_estimate_says_everything_that_was_asked_for(estimate: Estimate) -> None:
    terminal = Terminal(100)
    print_estimate(terminal.screen, estimate)
    text = terminal.text
    assert text.startswith("Full fine-tune of a model of 8B\n")
    assert "8B parameters" in text
    for label in (
        "parameters", "gradients", "optimizer", "activations", "logits", "together", "allocated", "reserved", "device",
        "host", "step", "throughput", "MFU", "a checkpoint", "the run", "steps", "duration", "cost", "energy",
    ):  # fmt: skip
        assert f"\n  {label} " in text, label
    assert "rtx-3090: NO, " in text
    assert "Fits on none of 3 known accelerators." in text
    assert "38,400 GiB" in text
    assert "32,106 years" in text
    assert "States do not grow with the tokens." in text
    assert "- sequences are packed" in text


def test_the_parts_shown_add_up_to_the_sum_shown(estimate: Estimate) -> None:
    terminal = Terminal(100)
    print_estimate(terminal.screen, estimate)
    lines = [line.split() for line in terminal.text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[:3] == ["Memory", "by", "part"])
    end = next(i for i, line in enumerate(lines) if line[:1] == ["together"])
    parts = [float(line[1].replace(",", "")) for line in lines[start + 1 : end]]
    assert sum(parts) == pytest.approx(float(lines[end][1].replace(",", "")), abs=0.05 * len(parts))


def test_unknown_times_and_runs_are_left_out(estimate: Estimate) -> None:
    terminal = Terminal()
    print_estimate(terminal.screen, dataclasses.replace(estimate, time=None, run=None))
    assert "Speed" not in terminal.text
    assert "The whole run" not in terminal.text


def test_names_are_neither_markup_nor_control_codes(estimate: Estimate) -> None:
    model = dataclasses.replace(estimate.model, name="[red]a\x1b[2Jb[/red]", inferred=False)
    terminal = Terminal()
    print_estimate(terminal.screen, dataclasses.replace(estimate, model=model))
    assert terminal.text.startswith("Full fine-tune of [red]a?[2Jb[/red]\n")


def test_runs_that_did_not_complete_are_listed_with_their_reason(runs: list[MeasuredRun]) -> None:
    terminal = Terminal()
    print_runs(terminal.console, runs)
    assert "- small, batch 64 x 256: oom: not enough memory: 24 GiB asked for" in terminal.text
    assert "- small, batch 32 x 256: timeout: no step ended within 120 s" in terminal.text


def test_a_setting_that_differs_between_runs_has_a_column() -> None:
    terminal = Terminal()
    runs = [MeasuredRun(run=name, setup=Setup(model="nano", precision=name)) for name in ("fp32", "bf16")]
    print_runs(terminal.console, runs)
    header, first, second = terminal.text.splitlines()
    assert "precision" in header
    assert "fp32" in first
    assert "bf16" in second


def test_a_comparison_shows_error_and_whether_the_interval_held() -> None:
    terminal = Terminal()
    rows = [
        Comparison(quantity="step time", unit="seconds", predicted=1.1, low=1.0, high=1.2, measured=1.0),
        Comparison(quantity="checkpoint", unit="disk_bytes", predicted=1e9, low=1e9, high=1e9, measured=2e9),
        Comparison(quantity="peak reserved", unit="bytes", predicted=1e9, low=None, high=None, measured=None),
    ]
    print_comparison(terminal.console, rows)
    _, step, checkpoint, reserved = (line.split() for line in terminal.text.splitlines())
    assert step[-2:] == ["+10%", "yes"]
    assert checkpoint[-2:] == ["-50%", "no"]
    assert reserved[-2:] == ["-", "-"]


def test_methods_are_named_in_words() -> None:
    assert describe_method(Setup(model="nano", method="qlora", lora_rank=8)) == "QLoRA fine-tune (rank 8, nf4)"
    assert describe_method(Setup(model="nano", method="freeze", trainable_layers=2)) == "Fine-tune of the last 2 layers"


def test_printing_an_estimate_loads_neither_templates_nor_figures_nor_numbers() -> None:
    code = (
        "import sys, reports.terminal, reports.document\n"
        "heavy = {'jinja2', 'matplotlib', 'numpy', 'pandas', 'scipy', 'torch', 'transformers', 'rich.table'}\n"
        "print(', '.join(heavy & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert loaded.stdout == "\n"
