"""What an estimate is made of: named parts that sum, intervals, and the facts they rest on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimator.setup import Setup
from estimator.units import Interval

if TYPE_CHECKING:
    from estimator.dryrun.result import DryRun
    from estimator.memory.host import HostMemory
    from estimator.remedies import Remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One named share of a total: bytes of memory, or seconds of a step."""

    name: str
    amount: float
    formula: str
    """In words or symbols, what was multiplied."""
    source: str
    """Where the formula comes from: code that was read, a measurement, or a fitted law."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    name: str
    parameters: int
    trainable_parameters: int
    active_parameters: int
    """Parameters that take part in one token's forward pass (fewer than ``parameters`` in a mixture of experts)."""
    layers: int
    hidden: int
    vocab: int
    inferred: bool
    """The shape was inferred from a parameter count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    method: str
    """``formula``, ``dry-run`` or ``measured`` (a formula whose coefficients were fitted to measured runs)."""
    phase: str
    """Where in the step the peak stands: ``forward``, ``backward``, ``optimizer`` (or ``evaluation``)."""
    parts: tuple[Part, ...]
    """Bytes at the peak; they sum exactly to ``peak_allocated_bytes.value``."""
    peak_allocated_bytes: Interval
    peak_reserved_bytes: Interval
    peak_device_bytes: Interval
    peak_host_bytes: Interval
    """Of one machine."""
    host: HostMemory | None = None
    """The same by rank; ``None`` on a CPU, whose host memory is the device's."""
    dry_run: DryRun | None = None
    """What the dry run found, where the memory is from one: what holds the peak, and the timeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitEstimate:
    """Whether the device peak fits one accelerator; ``None`` where the capacity is unknown."""

    gpu: str | None
    capacity_bytes: int | None
    """What the driver reports, less ``--reserve``."""
    fits: bool | None
    """Of the device; and of the machine's memory, where that was given."""
    margin_bytes: int | None
    host_margin_bytes: int | None = None
    """What is left of the machine's memory; ``None`` where that was not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    step_seconds: Interval
    tokens_per_second: Interval
    tokens_per_second_per_gpu: Interval
    model_flops_per_step: float
    mfu: Interval | None
    """``None`` where the accelerator's peak rate is unknown (a CPU)."""
    parts: tuple[Part, ...]
    """Seconds; they sum to ``step_seconds.value``."""
    method: str
    """``formula`` or ``measured``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEstimate:
    bytes: int
    model_bytes: int
    optimizer_bytes: int
    run_disk_bytes: int
    """What the run's kept checkpoints and its final model take on the disk at their most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """A whole run, from start to the last checkpoint."""

    steps: int
    tokens: int
    epochs: float
    hours: Interval
    """Wall time, everything included."""
    gpu_hours: Interval
    cost_usd: Interval | None
    energy_kwh: Interval | None
    """Of the machines, accelerators and all."""
    price_usd_per_gpu_hour: float | None
    price_source: str | None
    """Whose price, and of when."""
    parts: tuple[Part, ...] = ()
    """Hours of the start-up, the steps, evaluations, checkpoint writes and failures; they sum to ``hours.value``."""
    training_hours: Interval | None = None
    """The steps alone."""
    goodput: Interval | None = None
    """The steps' share of the wall time."""
    restarts: Interval | None = None
    """Expected number of failures that stop the run."""
    evaluations: int | None = None
    checkpoints: int | None = None
    save_every_steps: int | None = None
    checkpoint_written_bytes: int | None = None
    """Of all checkpoints, those included that were pruned later."""
    power_watts: float | None = None
    """The power limit of one accelerator."""
    power_source: str | None = None
    co2_kg: Interval | None = None
    grid_gco2_per_kwh: float | None = None
    grid_source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetEstimate:
    """What a sum of money trains. The low end of an interval is what it buys at the high ends of price and time."""

    budget_usd: float
    price_usd_per_gpu_hour: float
    price_source: str
    hours: Interval
    """Wall time that the money rents all accelerators for."""
    steps: Interval
    tokens: Interval
    epochs: Interval | None
    """Over the data; ``None`` where none was stated."""
    chinchilla_tokens: int
    """Compute-optimal tokens for this model: 20 a parameter."""
    chinchilla_share: Interval
    """``tokens`` over ``chinchilla_tokens``."""
    optimal_parameters: Interval
    """The size of the dense model that the same FLOPs pretrain best, on ``optimal_tokens``."""
    optimal_tokens: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveEstimate:
    """The straight proportion from a small measured run, and why it is wrong."""

    base: dict[str, float | str]
    """The run it scales: model, parameters, seq, batch, vram_bytes, seconds_per_token, source."""
    vram_bytes: float
    years: float | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    setup: Setup
    """Resolved: every default written out."""
    model: ModelSummary
    memory: MemoryEstimate
    fits: FitEstimate
    fits_on: tuple[FitEstimate, ...]
    """Every accelerator of the catalog whose usable memory is known, smallest first."""
    time: TimeEstimate | None
    """``None`` without an accelerator whose rate is known."""
    checkpoint: CheckpointEstimate
    run: RunEstimate | None
    """``None`` without an amount of data or without a time."""
    naive: NaiveEstimate
    calibration: str | None
    """The path of the calibration that was used."""
    notes: tuple[str, ...]
    """Assumptions and caveats that matter, one line each."""
    budget: BudgetEstimate | None = None
    """``None`` without a budget or without a time."""
    remedies: tuple[Remedy, ...] = ()
    """Where it does not fit and was asked for: what would make it fit, the cheapest first."""
