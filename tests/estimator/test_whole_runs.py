"""Published whole trainings: which can be predicted, from which layouts, and that the arithmetic is the run's."""

from __future__ import annotations

import pytest

from estimator.model.catalog import read_data
from estimator.units import Interval
from estimator.whole_runs import WholeRunScore, score_whole_runs, skipped_runs, whole_runs


def test_the_runs_with_everything_stated_are_these_five() -> None:
    assert {run.name for run in whole_runs() if run.stated} == {
        "Llama-2-7B replica", "TinyLlama-1.1B (plan)", "Pythia-1.0B", "GPT-2 124M (llm.c)", "DeepSeek-V3",
    }  # fmt: skip


def test_hours_are_the_published_ones_or_wall_time_by_accelerators() -> None:
    hours = {run.name: run.gpu_hours for run in whole_runs()}
    assert hours["Llama-2-7B replica"] == 162_000
    assert hours["TinyLlama-1.1B (plan)"] == 16 * 90 * 24
    assert hours["GPT-2 124M (llm.c)"] == pytest.approx(8 * 1.5)
    assert hours["DeepSeek-V3"] == 2_664_000  # the pretraining alone, as the row's note has it


def test_every_row_is_either_predicted_or_left_out_for_a_reason() -> None:
    assert len(whole_runs()) + sum(skipped_runs().values()) == len(read_data("whole_runs.csv"))
    assert set(skipped_runs()) == {
        "stops at a target quality: no tokens", "generates as well as trains", "no tokens stated",
    }  # fmt: skip


def test_every_layout_has_a_source_and_takes_a_usual_number_of_tokens_a_step() -> None:
    for run in whole_runs():
        assert run.layout_source, run.name
        assert 2**18 <= run.setup.tokens_per_step <= 2**26, run.name


def test_known_steps_come_out() -> None:
    # pythia-1b.yml trains 143,000 steps; llm.c's discussion 481 takes 524,288 tokens a step.
    runs = {run.name: run for run in whole_runs()}
    pythia, gpt2 = runs["Pythia-1.0B"], runs["GPT-2 124M (llm.c)"]
    assert pythia.tokens / pythia.setup.tokens_per_step == pytest.approx(143_000, rel=0.001)
    assert gpt2.setup.tokens_per_step == 524_288


def test_an_error_is_relative_to_the_published_hours_and_an_interval_holds_them_or_not() -> None:
    run = whole_runs()[0]
    score = WholeRunScore(
        run=run, predicted=Interval(value=1.1 * run.gpu_hours, low=run.gpu_hours, high=2 * run.gpu_hours)
    )
    assert score.error == pytest.approx(0.1) and score.held
    assert not WholeRunScore(run=run, predicted=Interval.exactly(1.1 * run.gpu_hours)).held


def test_stated_runs_are_predicted_and_the_intervals_hold_the_others() -> None:
    # A guard with room for a refit of the step law (llm.c's kernels in C outrun every PyTorch loop that it knows);
    # benchmarks/whole_runs.py prints how good the predictions are.
    scores = score_whole_runs()
    for score in scores:
        assert not score.run.stated or abs(score.error) < 0.45, (score.run.name, score.error)
    assert sum(score.held for score in scores) >= 0.85 * len(scores)
