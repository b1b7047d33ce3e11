"""From a step to a whole run: steps, hours, GPU-hours, dollars, energy; and the naive straight proportion beside it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from estimator.errors import InputError
from estimator.hardware import find_accelerator, is_cpu
from estimator.model.shape import ModelShape, active_parameters, count_parameters
from estimator.result import BudgetEstimate, CheckpointEstimate, NaiveEstimate, RunEstimate, TimeEstimate
from estimator.run.budget import budget_estimate
from estimator.run.facts import run_fact
from estimator.run.prices import Price, choose_price
from estimator.run.wall_time import Cadence, RunClock, run_clock
from estimator.setup import Setup
from estimator.units import GIB, Interval

SECONDS_PER_YEAR = 365.25 * 86_400
_MOST_EPOCHS = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """How much is trained, and at which price. Give tokens or samples, or neither."""

    dataset_tokens: int | None = None
    """Tokens of one epoch."""
    samples: int | None = None
    """Sequences of one epoch."""
    epochs: float = 1.0
    price_usd_per_gpu_hour: float | None = None
    """``None``: the median on-demand price of the catalog."""
    reserve_bytes: int = 0
    """Device memory that something else holds."""
    host_memory_bytes: int | None = None
    """Of one machine; ``None`` where it is not to be checked."""
    kept_checkpoints: int = 2
    save_every_steps: int | None = None
    """``None``: each epoch, and oftener where failures make that pay."""
    eval_samples: int | None = None
    """Sequences of one evaluation; ``None`` for no evaluation."""
    eval_every_steps: int | None = None
    """``None``: each epoch."""
    disk_bytes_per_second: float | None = None
    """What one machine writes checkpoints with; ``None``: assumed, with a wide interval."""
    provider: str | None = None
    spot: bool = False
    """Machines that can be taken back at any time."""
    budget_usd: float | None = None
    grid_gco2_per_kwh: float | None = None
    """``None``: the world's average."""

    def __post_init__(self) -> None:
        if self.dataset_tokens is not None and self.samples is not None:
            raise InputError("samples: give --samples or --dataset-tokens, not both")
        for flag, value in (
            ("dataset_tokens", self.dataset_tokens),
            ("samples", self.samples),
            ("epochs", self.epochs),
            ("keep", self.kept_checkpoints),
            ("host_memory", self.host_memory_bytes),
            ("save_every", self.save_every_steps),
            ("eval_samples", self.eval_samples),
            ("eval_every", self.eval_every_steps),
            ("disk_bandwidth", self.disk_bytes_per_second),
            ("budget", self.budget_usd),
        ):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{flag}: {value} is out of range; write a number above 0")
        if self.epochs > _MOST_EPOCHS:
            raise InputError(f"epochs: {self.epochs:g} are too many; write {_MOST_EPOCHS:g} or less")
        if self.price_usd_per_gpu_hour is not None and not 0 <= self.price_usd_per_gpu_hour < 1e6:
            raise InputError(
                f"price: {self.price_usd_per_gpu_hour} is no price; write dollars for one GPU-hour, --price 2.50"
            )
        if self.price_usd_per_gpu_hour is not None and (self.provider is not None or self.spot):
            raise InputError("price: give --price, or --provider and --spot, not both")
        if self.eval_every_steps is not None and self.eval_samples is None:
            raise InputError("eval_every: there is nothing to evaluate; write --eval-samples N as well")
        if self.grid_gco2_per_kwh is not None and not 0 <= self.grid_gco2_per_kwh <= 5000:
            raise InputError(
                f"grid_gco2: {self.grid_gco2_per_kwh} is no grid's intensity; write grams of CO2 a kWh, --grid-gco2 400"
            )
        if self.reserve_bytes < 0:
            raise InputError(f"reserve: {self.reserve_bytes} is too small; write for example --reserve 2GiB")

    def tokens(self, seq: int) -> int | None:
        """Of the whole run; ``None`` where no data is stated."""
        once = self.tokens_per_epoch(seq)
        return None if once is None else math.ceil(once * self.epochs)

    def tokens_per_epoch(self, seq: int) -> int | None:
        """``None`` where no data is stated."""
        return self.dataset_tokens if self.samples is None else self.samples * seq


def run_clock_of(
    shape: ModelShape, setup: Setup, request: RunRequest, step_seconds: Interval, checkpoint: CheckpointEstimate
) -> RunClock:
    """The pace at which ``setup`` (resolved) goes through any number of steps."""
    return run_clock(
        setup,
        step_seconds=step_seconds,
        parameters=count_parameters(shape).total,
        checkpoint=checkpoint,
        cadence=Cadence(
            epochs=request.epochs,
            save_every_steps=request.save_every_steps,
            eval_every_steps=request.eval_every_steps,
            eval_samples=request.eval_samples or 0,
        ),
        disk_bytes_per_second=request.disk_bytes_per_second,
    )


def run_estimate(
    shape: ModelShape, setup: Setup, request: RunRequest, time: TimeEstimate | None, checkpoint: CheckpointEstimate
) -> RunEstimate | None:
    """The whole run; ``None`` where no amount of data is stated, or no time is known. An unknown power leaves its fields ``None``, and so does
    an unknown price, unless a provider or spot was asked for (InputError)."""
    price = _price(setup, request)
    tokens = request.tokens(setup.seq)
    if tokens is None or time is None:
        return None
    steps = math.ceil(tokens / setup.tokens_per_step)
    taken = run_clock_of(shape, setup, request, time.step_seconds, checkpoint).run(steps)
    hours = taken.seconds.scaled(1 / 3600)
    gpu_hours = hours.scaled(setup.accelerators)
    power = _power(setup.accelerator)
    energy = None if power is None else gpu_hours.times(_machine_kilowatts(power[0]))
    grid, grid_source = _grid(request)
    return RunEstimate(
        steps=steps,
        tokens=tokens,
        epochs=request.epochs,
        hours=hours,
        gpu_hours=gpu_hours,
        cost_usd=None if price is None else gpu_hours.times(price.usd_per_gpu_hour),
        energy_kwh=energy,
        price_usd_per_gpu_hour=None if price is None else price.usd_per_gpu_hour.value,
        price_source=None if price is None else price.source,
        parts=tuple(dataclasses.replace(part, amount=part.amount / 3600) for part in taken.parts),
        training_hours=time.step_seconds.scaled(steps / 3600),
        goodput=taken.goodput,
        restarts=taken.restarts,
        evaluations=taken.evaluations,
        checkpoints=taken.checkpoints,
        save_every_steps=taken.save_every_steps,
        checkpoint_written_bytes=taken.checkpoints * checkpoint.bytes,
        power_watts=None if power is None else power[0],
        power_source=None if power is None else power[1],
        co2_kg=None if energy is None else energy.times(grid.scaled(1e-3)),
        grid_gco2_per_kwh=None if energy is None else grid.value,
        grid_source=None if energy is None else grid_source,
    )


def budgeted(
    shape: ModelShape, setup: Setup, request: RunRequest, time: TimeEstimate | None, checkpoint: CheckpointEstimate
) -> BudgetEstimate | None:
    """What ``request.budget_usd`` trains; ``None`` without one. Raises InputError where price or time is unknown."""
    if request.budget_usd is None:
        return None
    price = _price(setup, request)
    assert price is not None
    if time is None:
        raise InputError(
            f"budget: no step time is known for {setup.accelerator}; measure with `vramcalc profile` and `vramcalc fit`"
        )
    return budget_estimate(
        request.budget_usd,
        setup=setup,
        clock=run_clock_of(shape, setup, request, time.step_seconds, checkpoint),
        time=time,
        price=price,
        parameters=active_parameters(shape),
        tokens_per_epoch=request.tokens_per_epoch(setup.seq),
    )


def _price(setup: Setup, request: RunRequest) -> Price | None:
    return choose_price(
        setup.accelerator,
        given=request.price_usd_per_gpu_hour,
        provider=request.provider,
        spot=request.spot,
        needed=request.budget_usd is not None,
    )


def _power(accelerator: str | None) -> tuple[float, str] | None:
    """Watts of one accelerator's limit, and their source."""
    if accelerator is None or is_cpu(accelerator):
        return None
    device = find_accelerator(accelerator)
    return None if device.power_watts is None else (device.power_watts, device.source)


def _machine_kilowatts(limit_watts: float) -> Interval:
    """Of one accelerator that trains, with its part of the machine."""
    return run_fact("power_share").value.times(run_fact("machine_power").value).scaled(limit_watts / 1000)


def _grid(request: RunRequest) -> tuple[Interval, str]:
    """g CO2 a kWh."""
    if request.grid_gco2_per_kwh is not None:
        return Interval.exactly(request.grid_gco2_per_kwh), "given"
    fact = run_fact("grid_gco2_per_kwh")
    return fact.value, fact.source


# The small run of the story: Qwen1.5-0.5B in full on one 24 GiB card. Half the card at 2,048 tokens, and an epoch of
# 9,846 samples of 512 tokens in 45 minutes.
_BASE_PARAMETERS = 0.5e9
_BASE_TOKENS = 2048
_BASE_VRAM_BYTES = 12 * GIB
_BASE_TOKENS_PER_SECOND = 9_846 * 512 / (45 * 60)


def naive_estimate(parameters: int, setup: Setup, request: RunRequest) -> NaiveEstimate:
    """Memory in proportion to parameters x tokens, time to parameters x tokens, as one would scale a small run by hand."""
    tokens = request.tokens(setup.seq)
    ratio = parameters / _BASE_PARAMETERS
    vram = _BASE_VRAM_BYTES * ratio * (setup.seq * setup.batch / _BASE_TOKENS)
    seconds = None if tokens is None else tokens * ratio / _BASE_TOKENS_PER_SECOND / setup.accelerators
    return NaiveEstimate(
        base={
            "model": "Qwen1.5-0.5B",
            "parameters": _BASE_PARAMETERS,
            "seq": _BASE_TOKENS,
            "batch": 1,
            "vram_bytes": _BASE_VRAM_BYTES,
            "tokens_per_second": _BASE_TOKENS_PER_SECOND,
            "source": "full fine-tune on one 24 GiB card; an epoch of 9,846 samples of 512 tokens in 45 minutes",
        },
        vram_bytes=vram,
        years=None if seconds is None else seconds / SECONDS_PER_YEAR,
        reason=(
            "weights, gradients and optimizer states do not grow with tokens; activations grow with layers x width, not "
            "with parameters; the vocabulary's logits hardly grow with the model; and a small card's rate is not that of "
            "the accelerator that will be used"
        ),
    )
