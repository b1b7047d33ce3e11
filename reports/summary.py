"""The first thing that a report says: a few sentences and numbers, from runs, residuals, laws and a training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from estimator.calibration.fitting import Calibration
from estimator.measured import MeasuredRun
from estimator.result import Estimate
from estimator.score import Comparison as ScoredPair
from estimator.score import Score, score
from reports import scale
from reports.runs import setting_text, varied_settings
from reports.series import CHECKPOINT, QUANTITIES, STEP, Predictor, Quantity, Residual, parameters_of
from reports.training import Training

_OUTCOME_WORDS = {"oom": "ran out of memory", "failed": "failed", "timeout": "hit the time limit"}
_COMMON = ("method", "precision", "optimizer", "framework", "checkpointing", "attention", "accelerator", "accelerators")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One number that matters."""

    label: str
    value: str
    detail: str


def tiles(
    runs: Sequence[MeasuredRun],
    residuals: Sequence[Residual],
    calibration: Calibration | None,
    memory: Quantity,
) -> list[Tile]:
    """How many runs there are, and how far predictions were off in each quantity."""
    done = sum(run.outcome == "ok" for run in runs)
    others = ", ".join(f"{count} {_OUTCOME_WORDS[outcome]}" for outcome, count in _failures(runs).items())
    shown = [Tile(label="Runs", value=f"{done:,} of {len(runs):,}", detail=others or "all completed")]
    for quantity, label in ((memory, "Peak memory"), (STEP, "Step time"), (CHECKPOINT, "Checkpoint")):
        unseen = score_of(residuals, quantity, unseen=True)
        law = _held_out(calibration, quantity)
        if unseen is not None:
            detail = f"median error over {_runs(unseen.n)}; largest {scale.percent_text(unseen.max_ape)}"
            shown.append(Tile(label=label, value=scale.percent_text(unseen.median_ape), detail=detail))
        elif law is not None:
            detail = f"median error on {_runs(law.n)} left out; largest {scale.percent_text(law.max_ape)}"
            shown.append(Tile(label=label, value=scale.percent_text(law.median_ape), detail=detail))
    return shown


def sentences(
    runs: Sequence[MeasuredRun],
    residuals: Sequence[Residual],
    calibration: Calibration | None,
    training: Training | None,
    larger: Sequence[tuple[str, Estimate]],
    predict: Predictor,
) -> list[str]:
    """What was measured, how well it was predicted, what follows for bigger models, how the training went."""
    said = []
    if runs:
        said.append(_measured_sentence(runs, predict))
        if common := common_settings(runs):
            said.append(f"Common to all: {common}.")
    if calibration is not None:
        said += _law_sentences(residuals, calibration)
    elif residuals:
        said.append(
            "No law was fitted: predictions are the closed formula's, which has seen none of these runs. "
            f"It was off by {_errors(residuals)} (median)."
        )
    if larger:
        label, estimate = larger[-1]
        memory = scale.interval_text(estimate.memory.peak_allocated_bytes, "bytes")
        step = f" and {scale.interval_text(estimate.time.step_seconds, 'seconds')} a step" if estimate.time else ""
        said.append(
            f"A model of {label} on one such device, at batch {estimate.setup.batch} x {estimate.setup.seq:,} tokens, "
            f"would allocate {memory}{step}."
        )
    if training is not None:
        said.append(_training_sentence(training))
    return said


def common_settings(runs: Sequence[MeasuredRun]) -> str:
    """The settings that no run differs in and that describe the whole table: "full, fp32, adamw-fused, ..."."""
    varied = varied_settings(runs)
    setup = runs[0].setup
    stated = [(name, getattr(setup, name)) for name in _COMMON if name not in varied]
    texts = [
        f"{name.replace('_', ' ')} {setting_text(value)}"
        for name, value in stated
        if value is not None and (name, value) not in (("checkpointing", "none"), ("accelerators", 1))
    ]
    return ", ".join(texts)


def score_of(residuals: Sequence[Residual], quantity: Quantity, *, unseen: bool) -> Score | None:
    """The score of one quantity over the runs that the law has, or has not, seen."""
    return score(
        [
            ScoredPair(
                predicted=residual.predicted.value,
                low=residual.predicted.low,
                high=residual.predicted.high,
                measured=residual.measured,
            )
            for residual in residuals
            if residual.quantity == quantity and residual.unseen == unseen
        ]
    )


def _held_out(calibration: Calibration | None, quantity: Quantity) -> Score | None:
    laws = calibration.laws if calibration else ()
    return next((law.held_out.score for law in laws if law.quantity == quantity.name and law.held_out), None)


def _failures(runs: Sequence[MeasuredRun]) -> Counter[str]:
    return Counter(run.outcome for run in runs if run.outcome != "ok")


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count:,} runs"


def _measured_sentence(runs: Sequence[MeasuredRun], predict: Predictor) -> str:
    models = {run.setup.model for run in runs}
    sizes = [size for run in runs if (size := parameters_of(run, predict)) is not None]
    named = f"the model {next(iter(models))}" if len(models) == 1 else f"{len(models)} models"
    if sizes:
        named += f" of {scale.count_text(min(sizes))}"
        named += f" to {scale.count_text(max(sizes))} parameters" if max(sizes) > min(sizes) else " parameters"
    seqs = [run.setup.seq for run in runs]
    tokens = f"{min(seqs):,} to {max(seqs):,} tokens" if min(seqs) < max(seqs) else f"{seqs[0]:,} tokens"
    text = f"{len(runs):,} fine-tuning {'run' if len(runs) == 1 else 'runs'} of {named}, with sequences of {tokens}"
    failures = [f"{count:,} {_OUTCOME_WORDS[outcome]}" for outcome, count in _failures(runs).items()]
    return f"{text}: {', '.join(failures)}, the others completed." if failures else f"{text}; all completed."


def _errors(residuals: Sequence[Residual]) -> str:
    texts = []
    for quantity in QUANTITIES:
        found = score_of(residuals, quantity, unseen=True)
        if found is not None:
            texts.append(f"{scale.percent_text(found.median_ape)} in {quantity.short}")
    return ", ".join(texts)


def _law_sentences(residuals: Sequence[Residual], calibration: Calibration) -> list[str]:
    covered = calibration.range
    said = [
        f"The laws were fitted to {_runs(len(calibration.runs))} on {calibration.device or calibration.accelerator}, "
        f"models of {scale.count_text(covered.parameters_low)} to {scale.count_text(covered.parameters_high)} parameters."
    ]
    unseen = [residual for residual in residuals if residual.unseen]
    if unseen:
        largest = max(residual.parameters for residual in unseen)
        beyond = largest / covered.parameters_high
        size = f", up to {scale.digits(beyond, 2)} times the size of any in the fit" if beyond > 1.05 else ""
        count = len({residual.run.run for residual in unseen})
        said.append(f"They predicted {_runs(count)} that they had not seen{size}: off by {_errors(unseen)} (median).")
    held = [law for law in calibration.laws if law.held_out is not None]
    if held:
        errors = ", ".join(
            f"{scale.percent_text(law.held_out.score.median_ape)} in {_short(law.quantity)}"
            for law in held
            if law.held_out is not None
        )
        what = held[0].held_out.what if held[0].held_out else ""
        said.append(f"Refitted without {what}, the laws were off on it by {errors} (median).")
    return said


def _short(column: str) -> str:
    return next((quantity.short for quantity in QUANTITIES if quantity.name == column), column)


def _training_sentence(training: Training) -> str:
    best = training.best
    if best is None:
        return f"The training has logged {len(training.train):,} steps and no evaluation yet."
    text = f"The training's evaluation loss was lowest at epoch {best.epoch:.3g} ({best.loss:.4g})"
    if training.overfit_epoch is not None:
        return f"{text}; from epoch {training.overfit_epoch:.3g} on it overfits: evaluation rises while training falls."
    return f"{text}; it does not overfit."
