"""Fitting laws to runs made up from known coefficients: noise is Gaussian in the logarithm, outliers are gross."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from estimator.calibration.fitting import FLOP_TERMS, OTHER_TERMS, interval_of
from estimator.calibration.law_fitting import Form, S, fit_law, split_off_largest
from estimator.calibration.linear_law import LinearForm, LinearSample
from estimator.calibration.memory_law import MemoryForm, MemorySample
from estimator.calibration.time_law import TimeForm, TimeSample, doubt_of_median

# (name, layers, hidden): three sizes that a sweep on a laptop has, and one three times larger.
SIZES = (("nano", 4, 96), ("micro", 4, 256), ("mini", 6, 512))
LARGER = ("small", 9, 768)
VOCAB = 8192

# Seconds for each unit of work on a machine of 80 GFLOP/s and 12 GB/s.
RATES = {
    "matmul_flops[fp32]": 1 / 80e9, "head_flops[fp32]": 1 / 90e9, "attention_flops[fp32]": 1 / 40e9,
    "elementwise_bytes": 1 / 12e9, "logits_bytes": 1 / 9e9, "optimizer_bytes": 1 / 8e9, "launches": 6e-6, "step": 3e-3,
}  # fmt: skip


def work_of(layers: int, hidden: int, batch: int, seq: int) -> dict[str, float]:
    """The work of a plain decoder's step, from the textbook counts (6 FLOPs a parameter and token)."""
    tokens, matrices = batch * seq, 12 * layers * hidden**2
    return {
        "matmul_flops[fp32]": 6.0 * matrices * tokens,
        "head_flops[fp32]": 6.0 * hidden * VOCAB * tokens,
        "attention_flops[fp32]": 12.0 * layers * hidden * seq * tokens,
        "elementwise_bytes": 240.0 * layers * hidden * tokens,
        "logits_bytes": 24.0 * VOCAB * tokens,
        "optimizer_bytes": 28.0 * (matrices + VOCAB * hidden),
        "launches": 150.0 * layers + 50,
        "step": 1.0,
    }


def timed(name: str, layers: int, hidden: int, batch: int, seq: int, error: float = 0.0) -> TimeSample:
    terms = work_of(layers, hidden, batch, seq)
    return TimeSample(
        run=f"{name}-{batch}-{seq}",
        model=name,
        parameters=12 * layers * hidden**2 + VOCAB * hidden,
        tokens=batch * seq,
        measured=sum(RATES[term] * amount for term, amount in terms.items()) * math.exp(error),
        terms=terms,
    )


def sweep(seed: int = 0, noise: float = 0.04) -> list[TimeSample]:
    """Twelve points over three sizes."""
    chance = random.Random(seed)
    return [
        timed(*size, batch, seq, chance.gauss(0, noise)) for size in SIZES for seq in (128, 256) for batch in (1, 2)
    ]


def predict(form: Form[S], law_samples: Sequence[S], target: S, draws: int = 0) -> float:
    law = fit_law(form, law_samples, draws=draws)
    assert law is not None
    return form.predict(target, [coefficient.value for coefficient in law.coefficients])


TIME = TimeForm(["fp32"], "cpu")


@pytest.mark.parametrize("seed", range(6))
def test_twelve_noisy_points_predict_the_time_of_a_model_three_times_larger(seed: int) -> None:
    larger = timed(*LARGER, 2, 256)
    assert predict(TIME, sweep(seed), larger) == pytest.approx(larger.measured, rel=0.12)


def test_without_noise_the_matrix_rate_is_found() -> None:
    law = fit_law(TIME, sweep(noise=0.0), draws=0)
    assert law is not None
    found = {coefficient.name: coefficient.value for coefficient in law.coefficients}
    assert found["matmul_flops[fp32]"] == pytest.approx(RATES["matmul_flops[fp32]"], rel=0.15)
    assert set(found) == {f"{term}[fp32]" for term in FLOP_TERMS} | {*OTHER_TERMS, "step"}


def test_one_run_that_took_five_times_too_long_does_not_move_the_law() -> None:
    larger, samples = timed(*LARGER, 2, 256), sweep(seed=3)
    clean = predict(TIME, samples, larger)
    slow = timed("mini", 6, 512, 1, 128, error=math.log(5))
    spoiled = [slow if sample.run == slow.run else sample for sample in samples]
    assert spoiled != samples
    assert predict(TIME, spoiled, larger) == pytest.approx(clean, rel=0.08)


def test_the_90_percent_interval_of_a_larger_model_holds_its_true_time() -> None:
    larger, held, trials = timed(*LARGER, 2, 256), 0, 30
    for seed in range(trials):
        law = fit_law(TIME, sweep(seed + 100), draws=60)
        assert law is not None
        value = TIME.predict(larger, [coefficient.value for coefficient in law.coefficients])
        interval = interval_of(law, value, [TIME.predict(larger, draw) for draw in law.draws])
        assert interval.high / interval.low < 2.5  # wide enough to be true is easy; it must also say something
        held += interval.low <= larger.measured <= interval.high
    # Of 30 trials at 90%, fewer than 23 come about once in a hundred times.
    assert held >= 23


def test_a_run_whose_steps_scattered_counts_for_less_than_one_whose_steps_agreed() -> None:
    # Every run of the middle model took 40% too long on a busy machine, and its steps' spread says so.
    larger = timed(*LARGER, 2, 256)

    def busy(doubt: float) -> list[TimeSample]:
        return [
            TimeSample(
                run=one.run,
                model=one.model,
                parameters=one.parameters,
                tokens=one.tokens,
                measured=one.measured * (1.4 if one.model == "micro" else 1.0),
                terms=one.terms,
                doubt=doubt if one.model == "micro" else 0.0,
            )
            for one in sweep(noise=0.01)
        ]

    def error(samples: list[TimeSample]) -> float:
        return abs(predict(TIME, samples, larger) / larger.measured - 1)

    assert error(busy(doubt=0.3)) < 0.5 * error(busy(doubt=0.0))


def test_the_doubt_of_a_median_shrinks_with_the_root_of_the_steps() -> None:
    # Of 10,000 simulated medians of 25 normal steps, the deviation is the formula's within 10%.
    chance = random.Random(0)
    medians = [sorted(chance.gauss(1.0, 0.1) for _ in range(25))[12] for _ in range(10_000)]
    assert doubt_of_median(0.1645, 25) == pytest.approx(float(np.std(medians)), rel=0.1)
    assert doubt_of_median(0.2, 20) == pytest.approx(doubt_of_median(0.2, 5) / 2)
    assert doubt_of_median(None, 5) == doubt_of_median(0.2, None) == 0.0


def test_two_types_of_number_get_a_rate_each() -> None:
    samples = sweep(noise=0.02)
    half = [
        TimeSample(
            run=f"{one.run}-bf16",
            model=one.model,
            parameters=one.parameters,
            tokens=one.tokens,
            # bf16 halves the time of all products and leaves the rest.
            measured=sum(
                RATES[term] * amount * (0.5 if "[fp32]" in term else 1.0) for term, amount in one.terms.items()
            ),
            terms={term.replace("fp32", "bf16"): amount for term, amount in one.terms.items()},
        )
        for one in samples
    ]
    law = fit_law(TimeForm(["bf16", "fp32"], "cpu"), [*samples, *half], draws=0)
    assert law is not None
    found = {coefficient.name: coefficient.value for coefficient in law.coefficients}
    assert found["matmul_flops[bf16]"] / found["matmul_flops[fp32]"] == pytest.approx(0.5, rel=0.2)


def test_on_an_accelerator_steps_that_launches_bound_do_not_spoil_the_rate_of_the_work() -> None:
    # An RTX 3090 at 40 TFLOP/s and 700 GB/s behind 50 us launches: every short step takes the launches' time.
    rates = dict.fromkeys(RATES, 1 / 700e9) | {term: 1 / 40e12 for term in RATES if "flops" in term}
    rates |= {"launches": 50e-6, "step": 0.01}

    def gpu_run(tokens: int, error: float = 0.0) -> TimeSample:
        terms = work_of(24, 1024, 1, tokens)
        work = sum(rates[term] * amount for term, amount in terms.items() if term not in ("launches", "step"))
        seconds = max(work, rates["launches"] * terms["launches"]) + rates["step"]
        return TimeSample(
            run=str(tokens), model="m", parameters=1, tokens=tokens, measured=seconds * math.exp(error), terms=terms
        )

    chance = random.Random(0)
    samples = [gpu_run(tokens, chance.gauss(0, 0.02)) for tokens in range(200, 8000, 300)]
    longer = gpu_run(24_000)
    assert samples[0].measured == pytest.approx(samples[3].measured, rel=0.1)  # launches bound
    assert predict(TimeForm(["fp32"], "RTX-3090"), samples, longer) == pytest.approx(longer.measured, rel=0.15)


# --- memory -----------------------------------------------------------------------------------------------------------

SCALES = (1.0, 1.12, 0.95, 1.3)
CONSTANT = 3e6


def sized(name: str, layers: int, hidden: int, batch: int, seq: int, error: float = 0.0) -> MemorySample:
    """A run whose states are exact, whose activations are 12% more and temporaries 30% more than the formula says."""
    weights, tokens = 4.0 * (12 * layers * hidden**2 + VOCAB * hidden), batch * seq
    phases = (
        ("forward", (3 * weights, 136.0 * layers * tokens * hidden, 14.0 * tokens * VOCAB, 0.0)),
        ("backward", (4 * weights, 120.0 * layers * tokens * hidden, 14.0 * tokens * VOCAB, 16.0 * hidden**2)),
        ("optimizer", (4 * weights, 0.0, 0.0, weights)),
    )
    peaks = tuple(
        (phase, (sum(a * b for a, b in zip(row, SCALES, strict=True)) + CONSTANT) * math.exp(error))
        for phase, row in phases
    )
    return MemorySample(
        run=f"{name}-{batch}-{seq}",
        model=name,
        parameters=int(weights / 4),
        tokens=tokens,
        measured=max(peak for _, peak in peaks),
        phases=phases,
        phase_peaks=peaks,
    )


def memory_sweep(seed: int = 0, noise: float = 0.005) -> list[MemorySample]:
    chance = random.Random(seed)
    return [
        sized(*size, batch, seq, chance.gauss(0, noise)) for size in SIZES for seq in (128, 256) for batch in (1, 2)
    ]


def test_the_memory_law_finds_what_scales_each_group() -> None:
    law = fit_law(MemoryForm(), memory_sweep(noise=0.0), draws=0)
    assert law is not None
    found = {coefficient.name: coefficient.value for coefficient in law.coefficients}
    for (name, value), scale in zip(list(found.items())[:4], SCALES, strict=True):
        assert value == pytest.approx(scale, rel=0.03), name
    assert found["constant"] == pytest.approx(CONSTANT, rel=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_twelve_points_predict_the_memory_of_a_model_three_times_larger_within_two_percent(seed: int) -> None:
    larger = sized(*LARGER, 2, 256)
    assert predict(MemoryForm(), memory_sweep(seed), larger) == pytest.approx(larger.measured, rel=0.02)


def test_a_group_that_the_runs_never_show_stays_as_the_formula_has_it() -> None:
    samples = [
        MemorySample(run=str(i), model="m", parameters=i, tokens=1, measured=100.0 * i, phases=(("forward", (100.0 * i, 0.0, 0.0, 0.0)),))
        for i in range(1, 9)
    ]  # fmt: skip
    law = fit_law(MemoryForm(), samples, draws=40)
    assert law is not None
    logits = next(coefficient for coefficient in law.coefficients if coefficient.name == "logits")
    assert logits.value == pytest.approx(1.0, abs=1e-3)
    # Nothing is known of it, and the interval says so.
    assert logits.high - logits.low > 0.2


def test_where_runs_cannot_tell_the_activations_take_the_blame_and_not_the_states() -> None:
    # Half states, half activations in every run, and 10% more measured: states are counted, activations estimated.
    samples = [
        MemorySample(run=str(i), model="m", parameters=i, tokens=1, measured=220.0 * i, phases=(("forward", (100.0 * i, 100.0 * i, 0.0, 0.0)),))
        for i in range(1, 9)
    ]  # fmt: skip
    law = fit_law(MemoryForm(), samples, draws=0)
    assert law is not None
    found = {coefficient.name: coefficient.value for coefficient in law.coefficients}
    assert found["states"] == pytest.approx(1.0, abs=0.01)
    assert found["activations"] == pytest.approx(1.2, abs=0.02)


def test_a_run_with_a_wrong_peak_does_not_move_the_memory_law() -> None:
    larger, samples = sized(*LARGER, 2, 256), memory_sweep(seed=1)
    spoiled = [*samples[:-1], sized("mini", 6, 512, 2, 256, error=math.log(3))]
    assert predict(MemoryForm(), spoiled, larger) == pytest.approx(larger.measured, rel=0.03)


# --- lines ------------------------------------------------------------------------------------------------------------

DEVICE = LinearForm(quantity="peak_device_bytes", ratio=1.05, ratio_width=0.1, least_ratio=1.0, noise=0.03)


def line(constant: float, ratio: float, seed: int = 0, noise: float = 0.005) -> list[LinearSample]:
    chance = random.Random(seed)
    return [
        LinearSample(
            run=str(i),
            model=f"m{i // 4}",
            parameters=10 ** (i // 4),
            tokens=i,
            base=base,
            measured=(constant + ratio * base) * math.exp(chance.gauss(0, noise)),
        )
        for i, base in enumerate(2e8 * 1.5**i for i in range(12))
    ]


def test_a_context_and_a_ratio_are_told_apart() -> None:
    law = fit_law(DEVICE, line(7e8, 1.1), draws=0)
    assert law is not None
    found = {coefficient.name: coefficient.value for coefficient in law.coefficients}
    assert found["constant"] == pytest.approx(7e8, rel=0.05)
    assert found["ratio"] == pytest.approx(1.1, rel=0.02)


def test_device_memory_is_never_said_to_be_below_allocated() -> None:
    law = fit_law(DEVICE, line(0.0, 0.8), draws=40)
    assert law is not None
    assert all(draw[0] >= 0 and draw[1] >= 1 for draw in law.draws)
    assert law.coefficients[1].value >= 1


# --- what all laws share ----------------------------------------------------------------------------------------------


def test_no_coefficient_is_ever_negative_in_value_or_draw() -> None:
    for law in (fit_law(TIME, sweep(5), draws=40), fit_law(MemoryForm(), memory_sweep(5), draws=40)):
        assert law is not None
        assert all(coefficient.value >= 0 for coefficient in law.coefficients)
        assert all(number >= 0 for draw in law.draws for number in draw)
        assert len(law.draws) == 40


def test_the_same_runs_give_the_same_law() -> None:
    assert fit_law(TIME, sweep(2), draws=20) == fit_law(TIME, sweep(2), draws=20)


def test_too_few_runs_give_no_law() -> None:
    samples = sweep()[: TIME.minimum_runs]
    assert fit_law(TIME, samples, draws=0) is not None
    assert fit_law(TIME, samples[1:], draws=0) is None


def test_the_honest_score_is_that_of_a_law_that_never_saw_the_largest_model() -> None:
    samples = sweep(seed=7)
    law = fit_law(TIME, samples, draws=20)
    assert law is not None and law.held_out is not None
    assert law.held_out.fitted_runs == 8
    assert set(law.held_out.runs) == {sample.run for sample in samples if sample.model == "mini"}
    blind = fit_law(TIME, [sample for sample in samples if sample.model != "mini"], draws=0)
    assert blind is not None
    values = [coefficient.value for coefficient in blind.coefficients]
    errors = [abs(TIME.predict(one, values) / one.measured - 1) for one in samples if one.model == "mini"]
    assert law.held_out.score.max_ape == pytest.approx(max(errors))
    assert law.held_out.score.n == 4


def test_what_was_wrong_on_the_largest_model_is_expected_to_grow_beyond_it() -> None:
    # The largest model takes twice what the law of the others says: that must not go unsaid beyond it.
    samples = [
        TimeSample(
            run=one.run,
            model=one.model,
            parameters=one.parameters,
            tokens=one.tokens,
            measured=one.measured * (2.0 if one.model == "mini" else 1.0),
            terms=one.terms,
        )
        for one in sweep(seed=9, noise=0.01)
    ]
    law = fit_law(TIME, samples, draws=0)
    blind = fit_law(TIME, [one for one in samples if one.model != "mini"], draws=0)
    assert law is not None and law.held_out is not None and blind is not None
    values = [coefficient.value for coefficient in blind.coefficients]
    seen = [abs(TIME.predict(one, values) / one.measured - 1) for one in samples if one.model != "mini"]
    grown = law.held_out.score.p90_ape - float(np.percentile(seen, 90))
    assert grown > 0.3
    assert law.drift == pytest.approx(grown / math.log(law.held_out.reach))
    assert law.error_at(law.largest * law.held_out.reach) > grown


def test_with_one_model_size_the_largest_token_count_is_left_out_and_that_is_said() -> None:
    samples = [timed("mini", 6, 512, batch, seq) for seq in (128, 256) for batch in (1, 2, 4)]
    split = split_off_largest(samples)
    assert split is not None
    rest, out, what = split
    assert [one.tokens for one in out] == [1024] and len(rest) == 5
    assert what == "the largest token count (1024 tokens in a micro-batch; there is one model size only)"


def test_two_families_of_one_size_are_left_out_together() -> None:
    samples = [timed("nano", 4, 96, 1, 128), timed("mini", 6, 512, 1, 128), timed("mini-llama", 6, 511, 1, 128)]
    split = split_off_largest(samples)
    assert split is not None
    assert sorted(one.model for one in split[1]) == ["mini", "mini-llama"]
    assert "mini and mini-llama" in split[2]


def test_runs_of_one_size_and_token_count_leave_nothing_to_test_on() -> None:
    assert split_off_largest([timed("nano", 4, 96, 1, 128)] * 3) is None
