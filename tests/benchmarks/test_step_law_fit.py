"""``make laws``: the fit finds the coefficients that made its rows, and is not told what it is tested on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.fit_step_law import cross_validate
from benchmarks.step_law_coverage import half_width
from benchmarks.step_law_problem import NAMES, Problem, Row
from estimator.hardware import find_accelerator
from estimator.measured import MeasuredRun
from estimator.model.catalog import resolve_model
from estimator.setup import Setup
from estimator.speed.compute import is_megatron, step_work
from estimator.speed.rates import rates
from estimator.speed.step_law import levels


def rows() -> list[Row]:
    """Setups of two frameworks on two accelerators, without times."""
    found = []
    for framework in ("llm-foundry", "megatron"):
        for device in ("a100", "h100"):
            for model in ("qwen2.5-0.5b", "llama-3.1-8b"):
                for seq in (512, 2048, 8192):
                    setup = Setup(model=model, framework=framework, accelerator=device, seq=seq, batch=4).resolved()
                    accelerator, shape = find_accelerator(device), resolve_model(model)
                    at = rates(setup, accelerator)
                    assert at is not None
                    name = f"{framework} {device} {model} {seq}"
                    of = levels(setup, accelerator, megatron=bool(is_megatron(setup)))
                    found.append(
                        Row(
                            run=MeasuredRun(run=name, setup=setup, source=framework), setup=setup, shape=shape,
                            accelerator=accelerator, work=step_work(shape, setup), rates=at, seconds=1.0,
                            framework=of["total"][0][1],
                        )
                    )  # fmt: skip
    return found


def timed(problem: Problem, made_by: np.ndarray) -> Problem:
    """The same rows, each taking what the law with these unknowns says."""
    seconds = np.exp(problem.predicted(problem.logarithms(made_by)))
    return Problem(
        [dataclasses.replace(row, seconds=float(taken)) for row, taken in zip(problem.rows, seconds, strict=True)]
    )


@pytest.fixture(scope="module")
def problem() -> Problem:
    blank = Problem(rows())
    made_by = np.zeros(len(blank.widths))
    made_by[NAMES.index("matmul")] = 0.2
    made_by[NAMES.index("attention")] = -0.3
    made_by[len(NAMES) + blank.effects.index(("total", "framework", "megatron"))] = 0.1
    return timed(blank, made_by)


def test_the_fit_predicts_the_rows_that_a_law_of_its_form_made(problem: Problem) -> None:
    every = np.ones(len(problem.rows), dtype=bool)
    found, errors = problem.solve(every)
    assert np.abs(problem.predicted(problem.logarithms(found)) - problem.measured).max() < 0.03
    assert (errors > 0).all() and (errors <= problem.widths * 1.001).all()


def test_rows_left_out_are_predicted_without_them(problem: Problem) -> None:
    every = np.ones(len(problem.rows), dtype=bool)
    x, _ = problem.solve(every)
    groups = [row.framework for row in problem.rows]
    apart, unknown = cross_validate(problem, x, groups)
    assert all(kinds == ("framework",) for kinds in unknown)
    # Megatron is a tenth slower than the other framework tells.
    of = np.array([group == "megatron" for group in groups])
    assert np.median(apart[of]) == pytest.approx(np.exp(-0.1) - 1, abs=0.04)
    wrong = Problem(
        [
            dataclasses.replace(row, seconds=row.seconds * (9.0 if row.framework == "megatron" else 1.0))
            for row in problem.rows
        ]
    )
    again, _ = cross_validate(wrong, x, groups)
    # What is left out cannot pull its own prediction along.
    assert np.median(np.log1p(again[of]) - np.log1p(apart[of])) == pytest.approx(-np.log(9.0), abs=0.05)


def test_one_wild_row_does_not_move_the_others(problem: Problem) -> None:
    every = np.ones(len(problem.rows), dtype=bool)
    wild = Problem(
        [
            dataclasses.replace(row, seconds=row.seconds * (5.0 if index == 3 else 1.0))
            for index, row in enumerate(problem.rows)
        ]
    )
    found, _ = wild.solve(every)
    off = np.abs(wild.predicted(wild.logarithms(found)) - problem.measured)
    assert np.median(off) < 0.05


def test_nine_in_ten_stay_within_the_half_width() -> None:
    sizes = np.arange(1.0, 101.0)
    assert half_width(sizes, share=0.9) == 91.0
    assert half_width(np.array([1.0, 2.0, 3.0]), share=0.9) == 3.0
