"""Predicts every row of a table of measured runs and scores the predictions; what cannot be predicted is skipped with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from estimator.errors import InputError, MissingError
from estimator.measured import MeasuredRun
from estimator.result import Estimate
from estimator.score import QUANTITIES, Comparison, FitsTable, Score, count_fits, score, source_name
from estimator.setup import Setup
from estimator.units import Interval

SKIP_REASONS = {
    "unreadable row": "a value is outside the documented ones, or the setup contradicts itself",
    "not stated": "the sequence length or the micro-batch is empty; no default stands for them",
    "unknown model": "no shape is known for the model's name",
    "unpredictable setup": "the estimator refuses the setup",
    "did not end": "the run failed or timed out for another reason than memory",
    "nothing to compare": "no measured quantity of a stated kind, and no known capacity to judge the fit by",
}
"""Why a row is skipped as a whole. A skipped row's reason is one of these, a colon, and the particulars."""

UNPREDICTED_REASONS = {
    "accelerator not stated": "a step's time needs one",
    "no rate known": "the catalog has no rate of this accelerator for the precision",
}
"""Why a row that is predicted otherwise has no prediction of one quantity."""

CHECKPOINT_WIDTH = 0.005
"""Relative half-width of the interval that a checkpoint is judged by. An estimate states its bytes without one: tensors
are counted exactly, and only the files' headers and the trainer's own small files are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A row that was not predicted, or with ``quantity`` one quantity of a row that was."""

    run: str
    source: str
    reason: str
    quantity: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRun:
    """One row: its predictions beside what was measured, by quantity."""

    run: str
    source: str
    quantities: tuple[tuple[str, Comparison], ...]
    said_to_fit: bool | None
    """``None`` where the capacity is unknown."""
    did_fit: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """The scores of a table, by quantity (those that some row states)."""

    overall: tuple[tuple[str, Score], ...]
    by_source: tuple[tuple[str, tuple[tuple[str, Score], ...]], ...]
    fits: FitsTable
    rows: tuple[JudgedRun, ...]
    skipped: tuple[Skip, ...]
    unpredicted: tuple[Skip, ...]


def validate(
    runs: Iterable[MeasuredRun],
    predict: Callable[[Setup], Estimate],
    *,
    unreadable: Iterable[Skip] = (),
) -> Validation:
    """Scores of ``predict`` over ``runs``; ``unreadable`` rows are reported with the skipped ones."""
    rows: list[JudgedRun] = []
    skipped, unpredicted = list(unreadable), list[Skip]()
    # A table repeats setups; an estimate takes a millisecond or two.
    known: dict[Setup, Estimate | str] = {}
    for run in runs:
        answer = _answer(run, predict, known)
        if isinstance(answer, str):
            skipped.append(Skip(run=run.run, source=run.source, reason=answer))
            continue
        row, missing = _judge(run, answer)
        if not row.quantities and row.said_to_fit is None and not missing:
            skipped.append(
                Skip(run=run.run, source=run.source, reason=_reason("nothing to compare", _stated_kind(run)))
            )
        elif not row.quantities and row.said_to_fit is None:
            skipped.append(Skip(run=run.run, source=run.source, reason=missing[0].reason))
        else:
            rows.append(row)
            unpredicted += missing
    return Validation(
        overall=_scores(rows),
        by_source=tuple(
            (name, _scores([row for row in rows if source_name(row.source) == name]))
            for name in sorted({source_name(row.source) for row in rows})
        ),
        fits=count_fits((row.said_to_fit, row.did_fit) for row in rows if row.said_to_fit is not None),
        rows=tuple(rows),
        skipped=tuple(skipped),
        unpredicted=tuple(unpredicted),
    )


def refuse_nothing_predicted(validation: Validation, table: object) -> None:
    """Raises InputError where every row of ``table`` was skipped: its scores say nothing."""
    if validation.rows:
        return
    if not validation.skipped:
        raise InputError(f"table: {table} has no rows; write a table of measured runs")
    first, count = validation.skipped[0], len(validation.skipped)
    raise InputError(
        f"table: none of the {count} rows of {table} can be predicted; the first, run {first.run}: {first.reason}"
    )


def unreadable_row(run: str, source: str, problem: str) -> Skip:
    """A row that is not a measured run, or not a complete one, in the words of ``SKIP_REASONS``."""
    documented = problem.partition(":")[0] in SKIP_REASONS
    return Skip(run=run, source=source, reason=problem if documented else _reason("unreadable row", problem))


def _reason(kind: str, particulars: str) -> str:
    assert kind in SKIP_REASONS or kind in UNPREDICTED_REASONS, kind
    return f"{kind}: {particulars}"


def _answer(
    run: MeasuredRun,
    predict: Callable[[Setup], Estimate],
    known: dict[Setup, Estimate | str],
) -> Estimate | str:
    """The estimate of a run's setup, or why there is none."""
    if run.outcome not in ("ok", "oom"):
        return _reason("did not end", run.outcome)
    if run.setup not in known:
        try:
            known[run.setup] = predict(run.setup)
        except (InputError, MissingError) as error:
            kind = "unknown model" if str(error).startswith("model") else "unpredictable setup"
            known[run.setup] = _reason(kind, str(error))
    return known[run.setup]


def _judge(run: MeasuredRun, estimate: Estimate) -> tuple[JudgedRun, list[Skip]]:
    """The row, and the quantities that it states but the estimate does not answer."""
    memory, time, checkpoint = estimate.memory, estimate.time, estimate.checkpoint
    predicted = {
        "peak_allocated": (memory.peak_allocated_bytes, run.peak_allocated_bytes),
        "peak_reserved": (memory.peak_reserved_bytes, run.peak_reserved_bytes),
        "peak_device": (memory.peak_device_bytes, run.peak_device_bytes),
        "step_seconds": (time.step_seconds if time else None, run.step_seconds),
        "tokens_per_second": (
            time.tokens_per_second_per_gpu if time else None,
            run.tokens_per_second_per_accelerator,
        ),
        "checkpoint": (
            Interval.within(float(checkpoint.bytes), below=CHECKPOINT_WIDTH, above=CHECKPOINT_WIDTH),
            run.checkpoint_bytes,
        ),
    }
    assert set(predicted) == set(QUANTITIES)
    quantities, missing = [], []
    for name, (interval, measured) in predicted.items():
        if not measured or run.outcome != "ok":
            continue
        if interval is None:
            missing.append(Skip(run=run.run, source=run.source, reason=_no_time(run), quantity=name))
            continue
        judged = Comparison(predicted=interval.value, low=interval.low, high=interval.high, measured=float(measured))
        quantities.append((name, judged))
    row = JudgedRun(
        run=run.run,
        source=run.source,
        quantities=tuple(quantities),
        said_to_fit=estimate.fits.fits,
        did_fit=run.outcome == "ok",
    )
    return row, missing


def _no_time(run: MeasuredRun) -> str:
    if run.setup.accelerator is None:
        return _reason("accelerator not stated", "no step time")
    return _reason("no rate known", f"{run.setup.accelerator} in {run.setup.precision}")


def _stated_kind(run: MeasuredRun) -> str:
    return "a peak of unstated kind" if run.peak_unstated_bytes else "no peak, time or checkpoint"


def _scores(rows: Sequence[JudgedRun]) -> tuple[tuple[str, Score], ...]:
    found = []
    for name in QUANTITIES:
        result = score([judged for row in rows for quantity, judged in row.quantities if quantity == name])
        if result is not None:
            found.append((name, result))
    return tuple(found)
