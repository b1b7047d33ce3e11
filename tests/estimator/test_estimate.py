"""The estimate as a whole."""

from __future__ import annotations

import dataclasses

import pytest

from estimator.errors import DoesNotFitError, InputError
from estimator.estimate import estimate
from estimator.fits import refuse_what_does_not_fit
from estimator.result import Estimate
from estimator.run.cost import RunRequest
from estimator.setup import Setup
from estimator.units import GIB, Interval, parse_bytes, parse_count


def intervals(value: object) -> list[Interval]:
    if isinstance(value, Interval):
        return [value]
    if dataclasses.is_dataclass(value):
        return [found for spec in dataclasses.fields(value) for found in intervals(getattr(value, spec.name))]
    return []


@pytest.mark.parametrize("gpu", [None, "cpu", "RTX-3090", "H100-SXM-80GB", "MI300X", "A30"])
@pytest.mark.parametrize("model", ["nano", "8e9", "mixtral-8x7b", "deepseek-v3"])
def test_parts_sum_exactly_to_the_allocated_peak_and_every_value_lies_in_its_interval(
    model: str, gpu: str | None
) -> None:
    result = estimate(Setup(model=model, accelerator=gpu), request=RunRequest(samples=100))
    assert sum(part.amount for part in result.memory.parts) == result.memory.peak_allocated_bytes.value
    assert all(interval.low <= interval.value <= interval.high for interval in intervals(result))
    memory = result.memory
    assert memory.peak_allocated_bytes.value <= memory.peak_reserved_bytes.value <= memory.peak_device_bytes.value
    if result.time is not None:
        assert sum(p.amount for p in result.time.parts) == pytest.approx(result.time.step_seconds.value)


def test_an_8b_model_in_full_does_not_fit_a_24_gib_card_and_a_half_b_does() -> None:
    large = estimate(Setup(model="llama-3.1-8b", seq=512, accelerator="rtx-3090"))
    small = estimate(Setup(model="qwen1.5-0.5b", seq=512, accelerator="rtx-3090"))
    assert (large.fits.fits, small.fits.fits) == (False, True)
    with pytest.raises(DoesNotFitError, match=r"RTX-3090 has 23\.7 GiB"):
        refuse_what_does_not_fit(large)
    refuse_what_does_not_fit(small)


@pytest.mark.parametrize(("batch", "seq"), [(7, 512), (1, 2048)])
def test_what_the_story_trained_on_its_card_is_said_to_fit(batch: int, seq: int) -> None:
    # Qwen1.5-0.5B in full, fp16-mixed, on an RTX 3090 with 2 GiB taken by the desktop.
    setup = Setup(model="qwen1.5-0.5b", precision="fp16-mixed", batch=batch, seq=seq, accelerator="rtx-3090")
    assert estimate(setup, request=RunRequest(reserve_bytes=2 * GIB)).fits.fits is True


def test_the_reserve_is_taken_from_the_capacity() -> None:
    setup = Setup(model="nano", accelerator="rtx-3090")
    without, with_reserve = estimate(setup).fits, estimate(setup, request=RunRequest(reserve_bytes=2 * GIB)).fits
    assert without.capacity_bytes is not None and with_reserve.capacity_bytes == without.capacity_bytes - 2 * GIB


def test_host_memory_is_checked_where_it_is_given() -> None:
    setup = Setup(model="8e9", accelerator="H200", offload="optimizer", precision="bf16")
    tight = estimate(setup, request=RunRequest(host_memory_bytes=32 * GIB))
    assert tight.fits.fits is False and tight.fits.host_margin_bytes is not None and tight.fits.host_margin_bytes < 0
    with pytest.raises(DoesNotFitError, match="host memory"):
        refuse_what_does_not_fit(tight)


def test_an_unknown_accelerator_or_rate_is_never_guessed() -> None:
    with pytest.raises(InputError, match="did you mean"):
        estimate(Setup(model="nano", accelerator="rtx-3091"))
    unknown = estimate(Setup(model="nano", accelerator="A10G"))
    assert unknown.time is None
    assert any("no rate of A10G" in note for note in unknown.notes)


def test_defaults_that_matter_are_said() -> None:
    result: Estimate = estimate(Setup(model="8e9"))
    assert any("inferred" in note for note in result.notes)
    assert any("hf-trainer" in note and "bf16-mixed" in note for note in result.notes)


def test_numbers_are_read_as_people_write_them() -> None:
    assert parse_bytes("2GiB", "reserve") == 2 * 2**30
    assert parse_bytes("24 GB", "reserve") == 24 * 10**9
    assert parse_count("8B", "params") == parse_count("8e9", "params") == 8_000_000_000
    for text in ("", "GiB", "-1", "2XB", "1e", "nan", "inf"):
        with pytest.raises(InputError):
            parse_bytes(text, "reserve")
