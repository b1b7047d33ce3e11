"""The wall time of a whole run: steps, and what comes on top - start-up, evaluations, checkpoints, and failures.

Failures come at a rate per accelerator-hour and lose what was done since the last checkpoint, and the restart. The expected
time of a segment of work u between checkpoints, at a mean time M between failures and R a restart, is
M·exp(R/M)·(exp(u/M) - 1) (J. T. Daly, "A higher order estimate of the optimum checkpoint interval", 2006): half a segment
and a restart for each failure, where failures are rare.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from estimator.result import CheckpointEstimate, Part
from estimator.run.facts import run_fact
from estimator.setup import Setup
from estimator.units import Interval

# Beyond this many failures in a segment a run never ends; the number stays finite.
_NEVER = 50.0
# The forward pass alone, as a share of a training step of the same tokens, relative half-widths: no gradients to
# exchange and no optimizer, but smaller kernels.
_FORWARD_DOUBT = Interval(value=1.0, low=0.7, high=1.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """How often a run saves and evaluates. Steps count optimizer steps."""

    epochs: float
    save_every_steps: int | None
    """``None``: at the end of each epoch, and at the interval that loses least to failures where that is shorter."""
    eval_every_steps: int | None
    """``None``: at the end of each epoch."""
    eval_samples: int
    """0 for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTime:
    """Wall time by part, with 90% intervals."""

    seconds: Interval
    parts: tuple[Part, ...]
    """Seconds; they sum to ``seconds.value``."""
    goodput: Interval
    """The steps' share."""
    restarts: Interval
    """Expected number."""
    checkpoints: int
    save_every_steps: int
    evaluations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pace:
    """The uncertain factors of a wall time, at one point of their intervals."""

    step_seconds: float
    rework: float
    """What the steps take in practice, over what they take."""
    start_seconds: float
    compile_seconds: float
    forward_doubt: float
    disk_bytes_per_second: float
    """Of one machine."""
    restart_seconds: float
    failures_per_gpu_hour: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunClock:
    """Gives the wall time of any number of optimizer steps; more steps never take less."""

    middle: _Pace
    low: _Pace
    high: _Pace
    cadence: Cadence
    accelerators: int
    read_bytes: float
    """Of one machine at the start."""
    write_bytes: float
    """Of one machine for one checkpoint."""
    evaluation_steps: float
    """Training steps that one evaluation takes as long as."""

    def run(self, steps: int) -> RunTime:
        """``steps`` optimizer steps in all."""
        parts = tuple(
            Part(name=name, amount=amount, formula=_FORMULAS[name][0], source=_FORMULAS[name][1])
            for name, amount in self._parts(steps, self.middle).items()
            if amount
        )
        checkpoints = self._checkpoints(steps)
        return RunTime(
            seconds=self._spread(lambda pace: self._total(steps, pace)),
            parts=parts,
            goodput=self._spread(lambda pace: steps * pace.step_seconds / self._total(steps, pace)),
            restarts=self._spread(lambda pace: self._total(steps, pace) / self._between_failures(pace)),
            checkpoints=checkpoints,
            save_every_steps=math.ceil(steps / checkpoints),
            evaluations=self._evaluations(steps),
        )

    def seconds(self, steps: int) -> Interval:
        """The wall time alone."""
        return self._spread(lambda pace: self._total(steps, pace))

    def middle_seconds(self, steps: int, step_seconds: float) -> float:
        """The wall time of steps of another length, without its interval, which takes many times as long."""
        return self._total(steps, dataclasses.replace(self.middle, step_seconds=step_seconds), paced=step_seconds)

    def _spread(self, measure: Callable[[_Pace], float]) -> Interval:
        """The factors vary independently: what each moves alone adds in squares."""
        middle = measure(self.middle)
        above = below = 0.0
        for spec in fields(_Pace):
            for pace in (self.low, self.high):
                moved = measure(dataclasses.replace(self.middle, **{spec.name: getattr(pace, spec.name)})) - middle
                above, below = (math.hypot(above, moved), below) if moved > 0 else (above, math.hypot(below, moved))
        return Interval(value=middle, low=max(middle - below, 0.0), high=middle + above)

    def _between_failures(self, pace: _Pace) -> float:
        return 3600 / (pace.failures_per_gpu_hour * self.accelerators)

    def _total(self, steps: int, pace: _Pace, *, paced: float | None = None) -> float:
        return sum(self._parts(steps, pace, paced=paced).values())

    def _parts(self, steps: int, pace: _Pace, *, paced: float | None = None) -> dict[str, float]:
        """``paced``: seconds of a step that checkpoints are planned for, where not the middle's."""
        segments = self._segments(steps, paced)
        write = self.write_bytes / pace.disk_bytes_per_second
        parts = {
            "start-up": pace.start_seconds + pace.compile_seconds + self.read_bytes / pace.disk_bytes_per_second,
            "steps": steps * pace.step_seconds * pace.rework,
            "evaluation": self._evaluations(steps) * self.evaluation_steps * pace.step_seconds * pace.forward_doubt,
            "checkpoints": _whole(segments, steps) * write,
        }
        between = self._between_failures(pace)
        segment = steps / max(segments, 1.0)
        exposed = min((segment * pace.step_seconds + write) / between, _NEVER)
        restart = min(pace.restart_seconds / between, _NEVER)
        stretch = math.exp(restart) * (math.expm1(exposed) / exposed if exposed else 1.0)
        return parts | {"failures": sum(parts.values()) * (stretch - 1.0)}

    def _segments(self, steps: int, paced: float | None = None) -> float:
        """Stretches between checkpoints, a fraction where the last one is short."""
        if self.cadence.save_every_steps is not None:
            return steps / self.cadence.save_every_steps
        write = self.write_bytes / self.middle.disk_bytes_per_second
        by_failures = steps / optimal_steps(
            write, self._between_failures(self.middle), paced or self.middle.step_seconds
        )
        return max(min(math.ceil(self.cadence.epochs), steps), by_failures)

    def _checkpoints(self, steps: int) -> int:
        return _whole(self._segments(steps), steps)

    def _evaluations(self, steps: int) -> int:
        if not self.cadence.eval_samples:
            return 0
        every = self.cadence.eval_every_steps
        return math.ceil(self.cadence.epochs) if every is None else math.ceil(steps / every)


def _whole(segments: float, steps: int) -> int:
    """Checkpoints of so many stretches."""
    return min(max(math.ceil(segments), 1), steps)


_FORMULAS = {
    "start-up": ("start, compilation, one reading of the weights", "run_facts.csv"),
    "steps": ("steps x seconds a step", "the step's estimate"),
    "evaluation": ("evaluations x samples x forward's share of a step", "the step's estimate"),
    "checkpoints": ("checkpoints x bytes / disk bandwidth", "run_facts.csv, or --disk-bandwidth"),
    "failures": ("lost work and restarts at a rate per accelerator-hour", "run_facts.csv; Daly 2006"),
}


def optimal_steps(write_seconds: float, between_failures_seconds: float, step_seconds: float) -> int:
    """Steps between checkpoints that lose least to writing and to failures: sqrt(2·write·M) (Young 1974)."""
    return max(1, round(math.sqrt(2 * write_seconds * between_failures_seconds) / step_seconds))


def forward_share(setup: Setup) -> float:
    """Forward's part of the FLOPs of a training step on the same tokens: one of forward, backward's two (one where the
    weights are frozen) and what is recomputed."""
    backward = 2.0 if setup.method == "full" else 1.0
    return 1.0 / (1.0 + backward + {"none": 0.0, "full": 1.0, "selective": 0.3}[setup.checkpointing])


def run_clock(
    setup: Setup,
    *,
    step_seconds: Interval,
    parameters: int,
    checkpoint: CheckpointEstimate,
    cadence: Cadence,
    disk_bytes_per_second: float | None = None,
) -> RunClock:
    """The clock of ``setup`` (resolved)."""
    disk = run_fact("disk_bytes_per_second").value
    machines = math.ceil(setup.accelerators / setup.gpus_per_node)
    factors = {
        "step_seconds": step_seconds,
        "rework": run_fact("rework").value if machines > 1 else Interval.exactly(1.0),
        "start_seconds": run_fact("start_seconds" if machines == 1 else "cluster_start_seconds").value,
        "compile_seconds": run_fact("compile_seconds").value if setup.compile else Interval.exactly(0.0),
        "forward_doubt": _FORWARD_DOUBT,
        "disk_bytes_per_second": disk if disk_bytes_per_second is None else Interval.exactly(disk_bytes_per_second),
        "restart_seconds": run_fact("restart_seconds").value,
        "failures_per_gpu_hour": run_fact("failures_per_gpu_hour").value,
    }
    middle, low, high = (
        _Pace(**{name: getattr(factor, end) for name, factor in factors.items()}) for end in ("value", "low", "high")
    )
    sharded = setup.sharding in ("fsdp", "zero1", "zero2", "zero3") or setup.model_parallel > 1
    per_rank = math.ceil(cadence.eval_samples / setup.data_ranks)
    return RunClock(
        middle=middle,
        low=low,
        high=high,
        cadence=cadence,
        accelerators=setup.accelerators,
        read_bytes=2.0 * parameters,  # half-precision weights, whole on every machine
        write_bytes=checkpoint.bytes / (machines if sharded else 1),
        evaluation_steps=forward_share(setup) * per_rank / (setup.batch * setup.accumulation),
    )
