"""Fits the laws of one device to a table of measured runs: memory, time, checkpoints.

Each run is set beside what the formulas compute for its setup; runs that a law cannot use are dropped with a reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from estimator.calibration.fitting import Calibration, Dropped, Law, Range, canonical_name, compute_type, time_terms
from estimator.calibration.law_fitting import Form, S, fit_law
from estimator.calibration.linear_law import LinearForm, LinearSample
from estimator.calibration.memory_law import MemoryForm, MemorySample, phase_groups
from estimator.calibration.time_law import TimeForm, TimeSample, doubt_of_median
from estimator.errors import InputError, MissingError
from estimator.measured import MeasuredRun
from estimator.memory.checkpoint import checkpoint_bytes
from estimator.memory.formula import PhaseMemory, memory_phases
from estimator.model.catalog import resolve_model
from estimator.model.shape import count_parameters
from estimator.setup import Setup
from estimator.speed.compute import StepWork, step_work

DRAWS = 200
"""Bootstrap refits: enough for the 5th and 95th percentile, and half a second of work."""

RESERVED_FORM = LinearForm(quantity="peak_reserved_bytes", ratio=1.05, ratio_width=0.1, least_ratio=1.0, noise=0.03)
DEVICE_FORM = LinearForm(quantity="peak_device_bytes", ratio=1.05, ratio_width=0.1, least_ratio=1.0, noise=0.03)
CHECKPOINT_FORM = LinearForm(quantity="checkpoint_bytes", ratio=1.0, ratio_width=0.005, least_ratio=0.0, noise=0.002)
QUANTITIES = (
    MemoryForm.quantity,
    RESERVED_FORM.quantity,
    DEVICE_FORM.quantity,
    TimeForm.quantity,
    CHECKPOINT_FORM.quantity,
)
"""What there are laws of, by column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Observation:
    """A run that can be used, beside what the formulas say of it."""

    run: MeasuredRun
    setup: Setup
    parameters: int
    phases: tuple[PhaseMemory, ...]
    work: StepWork
    checkpoint_bytes: int
    """By the formula."""

    def common(self, measured: float) -> dict[str, Any]:
        return {
            "run": self.run.run,
            "model": self.setup.model,
            "parameters": self.parameters,
            "tokens": self.setup.batch * self.setup.seq,
            "measured": measured,
        }


def fit(
    runs: Sequence[MeasuredRun],
    *,
    unreadable: Sequence[tuple[str, str]] = (),
    accelerator: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Calibration:
    """The laws of the one device that ``runs`` were measured on; of ``accelerator`` alone where that is given.

    A law that has too few runs is left out; of two rows with one ``run`` id the later counts. ``unreadable`` rows, as
    (run, reason), are listed with the dropped ones. Raises InputError where the runs are of several devices, or where no
    law has enough runs (it says what to profile next), and MissingError without scipy.
    """
    _need_scipy()
    if not runs and unreadable:
        run, reason = unreadable[0]
        raise InputError(f"table: none of its {len(unreadable)} rows can be used; the first, run {run}: {reason}")
    latest = list({run.run: run for run in runs}.values())
    name, device, chosen = _of_one_device(latest, accelerator)
    dropped = [Dropped(run=run, quantity="all", reason=f"unreadable row: {reason}") for run, reason in unreadable]
    observations = _observe(chosen, dropped)
    memory = _fit_memory(observations, dropped, draws, seed)
    time = _fit_time(observations, dropped, draws, seed, name)
    reserved = _fit_on_allocated(RESERVED_FORM, observations, dropped, draws, seed)
    device_memory = _fit_on_allocated(DEVICE_FORM, observations, dropped, draws, seed)
    checkpoint = _fit_checkpoint(observations, dropped, draws, seed)
    if not any((memory, time, checkpoint)):
        raise InputError(_too_few(observations, dropped))
    without = Counter(drop.run for drop in dropped)
    used = [observation for observation in observations if without[observation.run.run] < len(QUANTITIES)]
    return Calibration(
        accelerator=name,
        device=device,
        environment=used[-1].run.environment,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        runs=tuple(observation.run.run for observation in used),
        dropped=tuple(dropped),
        range=_range(used),
        memory=memory,
        reserved=reserved,
        device_memory=device_memory,
        time=time,
        checkpoint=checkpoint,
    )


def device_name(run: MeasuredRun) -> str | None:
    """The device as it names itself in the run's environment, where that was recorded; of a CPU, with its threads.

    Two threads of a CPU are another device than sixteen, as far as time goes.
    """
    try:
        recorded = json.loads(run.environment or "{}")
    except ValueError:
        return None
    name = recorded.get("device") if isinstance(recorded, dict) else None
    if not isinstance(name, str) or not name:
        return None
    threads = recorded.get("threads")
    return f"{name}, {threads} threads" if recorded.get("device_kind") == "cpu" and threads else name


def _need_scipy() -> None:
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise MissingError("fit needs scipy; pip install 'vramcalc-toolkit[fit]'") from None


def _of_one_device(runs: Sequence[MeasuredRun], accelerator: str | None) -> tuple[str, str | None, list[MeasuredRun]]:
    """(accelerator, device, its runs). Raises InputError for several devices."""
    named = [run for run in runs if run.setup.accelerator]
    if accelerator is not None:
        wanted = (canonical_name(accelerator), accelerator.lower())  # the catalog's name, or the device's own
        named = [
            run
            for run in named
            if canonical_name(str(run.setup.accelerator)) == wanted[0] or (device_name(run) or "").lower() == wanted[1]
        ]
    if not named:
        known = sorted({str(run.setup.accelerator) for run in runs if run.setup.accelerator})
        if accelerator is None or not known:
            raise InputError("table: no row names its accelerator, so the laws would be of no device; fill that column")
        raise InputError(f"accelerator: no row is of {accelerator!r}; the table holds {_some(known)}")
    accelerators = sorted({canonical_name(str(run.setup.accelerator)) for run in named})
    if len(accelerators) > 1:
        raise InputError(
            f"table: the runs are of {len(accelerators)} accelerators ({_some(accelerators)}), and laws hold for one; "
            f"choose with --accelerator {accelerators[0]}"
        )
    devices = sorted({name for run in named if (name := device_name(run))})
    if len(devices) > 1:
        raise InputError(
            f"table: the runs are of {len(devices)} devices ({_some(devices)}), and laws hold for one; "
            f"choose with --accelerator {devices[0]!r}"
        )
    return str(named[-1].setup.accelerator), devices[0] if devices else None, named


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _observe(runs: Sequence[MeasuredRun], dropped: list[Dropped]) -> list[_Observation]:
    observations = []
    for run in runs:
        if run.outcome != "ok":
            reason = f"the run ended as {run.outcome}"
        else:
            try:
                observations.append(_observation(run))
                continue
            except (InputError, MissingError) as error:
                reason = f"the formulas cannot say what it takes ({error})"
        dropped.append(Dropped(run=run.run, quantity="all", reason=reason))
    return observations


def _observation(run: MeasuredRun) -> _Observation:
    setup, shape = run.setup.resolved(), resolve_model(run.setup.model)
    return _Observation(
        run=run,
        setup=setup,
        parameters=run.parameters or count_parameters(shape).total,
        phases=memory_phases(shape, setup),
        work=step_work(shape, setup),
        checkpoint_bytes=sum(checkpoint_bytes(shape, setup)),
    )


def _fit_memory(observations: Sequence[_Observation], dropped: list[Dropped], draws: int, seed: int) -> Law | None:
    samples = []
    for seen in observations:
        run = seen.run
        if not run.peak_allocated_bytes:
            dropped.append(_without(run, MemoryForm.quantity))
            continue
        recorded = {
            "forward": run.peak_forward_bytes,
            "backward": run.peak_backward_bytes,
            "optimizer": run.peak_optimizer_bytes,
        }
        samples.append(
            MemorySample(
                **seen.common(run.peak_allocated_bytes),
                phases=phase_groups(seen.phases),
                phase_peaks=tuple((phase, float(peak)) for phase, peak in recorded.items() if peak),
            )
        )
    return _fit_or_drop(MemoryForm(), samples, dropped, draws, seed)


def _fit_time(
    observations: Sequence[_Observation], dropped: list[Dropped], draws: int, seed: int, accelerator: str
) -> Law | None:
    samples = []
    for seen in observations:
        seconds = _seconds(seen)
        if seconds is None:
            dropped.append(_without(seen.run, TimeForm.quantity))
        elif seen.setup.accelerators > 1:
            reason = f"its step spans {seen.setup.accelerators} accelerators; the law is of one"
            dropped.append(Dropped(run=seen.run.run, quantity=TimeForm.quantity, reason=reason))
        else:
            terms = time_terms(seen.work, compute_type(seen.setup))
            doubt = doubt_of_median(seen.run.step_seconds_spread, seen.run.timed_steps)
            samples.append(TimeSample(**seen.common(seconds), terms=terms, doubt=doubt))
    types = sorted({compute_type(seen.setup) for seen in observations})
    types = [kind for kind in types if any(f"matmul_flops[{kind}]" in sample.terms for sample in samples)]
    return _fit_or_drop(TimeForm(types, accelerator), samples, dropped, draws, seed)


def _seconds(seen: _Observation) -> float | None:
    """Of a step, as measured or from the tokens that were measured each second."""
    if seen.run.step_seconds:
        return seen.run.step_seconds
    rate = seen.run.tokens_per_second_per_accelerator
    return seen.setup.tokens_per_step / (rate * seen.setup.accelerators) if rate else None


def _fit_on_allocated(
    form: LinearForm, observations: Sequence[_Observation], dropped: list[Dropped], draws: int, seed: int
) -> Law | None:
    samples = []
    for seen in observations:
        measured, allocated = getattr(seen.run, form.quantity), seen.run.peak_allocated_bytes
        if measured and allocated:
            samples.append(LinearSample(**seen.common(measured), base=float(allocated)))
        else:
            dropped.append(_without(seen.run, form.quantity if not measured else MemoryForm.quantity, form.quantity))
    return _fit_or_drop(form, samples, dropped, draws, seed)


def _fit_checkpoint(observations: Sequence[_Observation], dropped: list[Dropped], draws: int, seed: int) -> Law | None:
    samples = []
    for seen in observations:
        if seen.run.checkpoint_bytes:
            samples.append(LinearSample(**seen.common(seen.run.checkpoint_bytes), base=float(seen.checkpoint_bytes)))
        else:
            dropped.append(_without(seen.run, CHECKPOINT_FORM.quantity))
    return _fit_or_drop(CHECKPOINT_FORM, samples, dropped, draws, seed)


def _fit_or_drop(form: Form[S], samples: Sequence[S], dropped: list[Dropped], draws: int, seed: int) -> Law | None:
    law = fit_law(form, samples, draws=draws, seed=seed)
    if law is None:
        reason = f"{len(samples)} runs state it; the law needs {form.minimum_runs}"
        dropped += [Dropped(run=sample.run, quantity=form.quantity, reason=reason) for sample in samples]
    return law


def _without(run: MeasuredRun, lacking: str, quantity: str | None = None) -> Dropped:
    return Dropped(run=run.run, quantity=quantity or lacking, reason=f"{lacking} was not measured")


def _too_few(observations: Sequence[_Observation], dropped: Sequence[Dropped]) -> str:
    """One line: what there is, and what to profile next."""
    failed = sum(drop.quantity == "all" for drop in dropped)
    models = sorted({seen.setup.model for seen in observations})
    have = f"{len(observations)} usable runs" + (f" of {_some(models)}" if models else "")
    if failed:
        have += f" ({failed} more did not end ok or have no known shape)"
    return (
        f"table: {have} are too few for a law: memory needs {MemoryForm.minimum_runs}, time {TimeForm.minimum_runs}, checkpoints "
        f"{CHECKPOINT_FORM.minimum_runs}; profile more, for example `vramcalc profile --model nano,micro,mini --seq 128,256 --batch 1,2`"
    )


def _range(observations: Sequence[_Observation]) -> Range:
    def seen(name: str) -> tuple[str, ...]:
        return tuple(sorted({str(getattr(observation.setup, name)) for observation in observations}))

    tokens = [observation.setup.batch * observation.setup.seq for observation in observations]
    parameters = [observation.parameters for observation in observations]
    return Range(
        parameters_low=min(parameters),
        parameters_high=max(parameters),
        tokens_low=min(tokens),
        tokens_high=max(tokens),
        models=seen("model"),
        precisions=seen("precision"),
        methods=seen("method"),
        frameworks=seen("framework"),
        optimizers=seen("optimizer"),
        checkpointings=seen("checkpointing"),
        attentions=seen("attention"),
    )
