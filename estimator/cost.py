"""From a step to a whole run: steps, hours, GPU-hours, dollars, energy; and the naive straight proportion beside it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from estimator.catalog import read_data
from estimator.errors import InputError
from estimator.hardware import Accelerator, find_accelerator, is_cpu
from estimator.result import NaiveEstimate, RunEstimate, TimeEstimate
from estimator.setup import Setup
from estimator.units import GIB, Interval

SECONDS_PER_YEAR = 365.25 * 86_400
# Share of its power limit that a training accelerator draws, and what the rest of the machine adds.
_POWER_SHARE = Interval(value=0.85, low=0.6, high=1.25)


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

    def __post_init__(self) -> None:
        if self.dataset_tokens is not None and self.samples is not None:
            raise InputError("samples: give --samples or --dataset-tokens, not both")
        for flag, value in (
            ("dataset_tokens", self.dataset_tokens),
            ("samples", self.samples),
            ("epochs", self.epochs),
            ("keep", self.kept_checkpoints),
            ("host_memory", self.host_memory_bytes),
        ):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{flag}: {value} is out of range; write a number above 0")
        if self.price_usd_per_gpu_hour is not None and not 0 <= self.price_usd_per_gpu_hour < 1e6:
            raise InputError(
                f"price: {self.price_usd_per_gpu_hour} is no price; write dollars for one GPU-hour, --price 2.50"
            )
        if self.reserve_bytes < 0:
            raise InputError(f"reserve: {self.reserve_bytes} is too small; write for example --reserve 2GiB")

    def tokens(self, seq: int) -> int | None:
        """Of the whole run; ``None`` where no data is stated."""
        once = self.dataset_tokens if self.samples is None else self.samples * seq
        return None if once is None else math.ceil(once * self.epochs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars for one accelerator-hour, over the providers of the catalog."""

    usd_per_gpu_hour: Interval
    source: str


@functools.cache
def catalog_price(accelerator: str) -> Price | None:
    """The median on-demand price, and the cheapest and dearest; ``None`` where no provider lists it."""
    name = find_accelerator(accelerator).name
    rows = [r for r in read_data("prices.csv") if r["accelerator"] == name and r["usd_per_gpu_hour"]]
    demand = [r for r in rows if r["type"] == "on-demand"] or rows
    if not demand:
        return None
    prices = sorted(float(row["usd_per_gpu_hour"]) for row in demand)
    middle = (prices[(len(prices) - 1) // 2] + prices[len(prices) // 2]) / 2
    return Price(
        usd_per_gpu_hour=Interval(value=middle, low=prices[0], high=prices[-1]),
        source=f"median of {len(prices)} {demand[0]['type']} prices in the catalog",
    )


def run_estimate(setup: Setup, request: RunRequest, time: TimeEstimate) -> RunEstimate | None:
    """The whole run; ``None`` where no amount of data is stated. An unknown price or power leaves its field ``None``."""
    tokens = request.tokens(setup.seq)
    if tokens is None:
        return None
    steps = math.ceil(tokens / setup.tokens_per_step)
    hours = time.step_seconds.scaled(steps / 3600)
    gpu_hours = hours.scaled(setup.accelerators)
    price, source = _price(setup.accelerator, request.price_usd_per_gpu_hour)
    power = _power_watts(setup.accelerator)
    return RunEstimate(
        steps=steps,
        tokens=tokens,
        epochs=request.epochs,
        hours=hours,
        gpu_hours=gpu_hours,
        cost_usd=None if price is None else _product(gpu_hours, price),
        energy_kwh=None if power is None else _product(gpu_hours, _POWER_SHARE.scaled(power / 1000)),
        price_usd_per_gpu_hour=None if price is None else price.value,
        price_source=source,
    )


def _price(accelerator: str | None, given: float | None) -> tuple[Interval | None, str | None]:
    if given is not None:
        return Interval.exactly(given), "given"
    if accelerator is None or is_cpu(accelerator):
        return None, None
    listed = catalog_price(accelerator)
    return (None, None) if listed is None else (listed.usd_per_gpu_hour, listed.source)


def _power_watts(accelerator: str | None) -> float | None:
    if accelerator is None or is_cpu(accelerator):
        return None
    device: Accelerator = find_accelerator(accelerator)
    return device.power_watts


def _product(left: Interval, right: Interval) -> Interval:
    return Interval(value=left.value * right.value, low=left.low * right.low, high=left.high * right.high)


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
