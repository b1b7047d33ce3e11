"""Published whole trainings: which can be predicted, from which layouts, and that the arithmetic is the run's."""

from __future__ import annotations

import dataclasses

import pytest

from estimator.estimate import estimate
from estimator.model.catalog import read_data, resolve_model
from estimator.run.cost import RunRequest
from estimator.speed.compute import step_work
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


def test_of_an_unknown_layout_the_interval_holds_what_others_would_take() -> None:
    """The 70B's own, of the same card: more devices, split eight ways."""
    run = next(run for run in whole_runs() if run.name == "Llama-3-8B")
    assert not run.layout_stated and run.tokens == 15_500_000_000_000  # "15T+"
    score = next(score for score in score_whole_runs() if score.run.name == run.name)
    other = dataclasses.replace(run.setup, accelerators=8192, tensor_parallel=8, sharding="zero1")
    assert other.resolved().tokens_per_step == run.setup.tokens_per_step
    found = estimate(other, request=RunRequest(dataset_tokens=run.tokens)).run
    assert found is not None and found.gpu_hours.value > 1.2 * score.predicted.value
    assert score.predicted.low < found.gpu_hours.value < score.predicted.high


def test_llm_c_keeps_and_moves_what_its_code_does() -> None:
    """Counted in train_gpt2.cu: 16 C values a layer kept (-r 0) beside statistics, logits in place, and by its kernels 45 C
    read or written beside the products."""
    run = next(run for run in whole_runs() if "llm.c" in run.name)
    shape, setup = resolve_model(run.setup.model), run.setup.resolved()
    tokens, width, layers = 64 * 1024, 768, 12
    work = step_work(shape, setup)
    assert work.elementwise_bytes == pytest.approx(tokens * layers * 2 * 45 * width)
    assert work.logits_bytes == pytest.approx(tokens * 3 * 2 * 50_257)
    parts = {part.name: part.amount for part in estimate(run.setup).memory.parts}
    statistics = 4 * (4 + 12)  # means and deviations of two norms, the heads' log-sums; fp32
    assert parts["activations"] == pytest.approx(tokens * layers * (2 * 16 * width + statistics), rel=0.02)
    assert parts["logits"] == pytest.approx(tokens * 2 * 50_257, rel=0.01)


def test_stated_runs_are_predicted_and_the_intervals_hold_the_others() -> None:
    # A guard with room for a refit of the step law; benchmarks/whole_runs.py prints how good the predictions are.
    scores = score_whole_runs()
    for score in scores:
        assert not score.run.stated or abs(score.error) < 0.3, (score.run.name, score.error)
    assert sum(score.held for score in scores) >= 0.9 * len(scores)
