"""What would make a setup fit: every remedy is held against a full estimate of the setup that it proposes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from estimator.estimate import estimate
from estimator.remedies import Remedy
from estimator.result import Estimate
from estimator.run.cost import RunRequest
from estimator.setup import Setup

TOO_LARGE: list[dict[str, Any]] = [
    {"model": "qwen1.5-0.5b", "precision": "fp16-mixed", "batch": 12, "seq": 512, "accelerator": "rtx-3090"},
    {"model": "llama-3.1-8b", "precision": "bf16", "accelerator": "rtx-3090"},
    {"model": "llama-3.1-8b", "accelerator": "h100", "accelerators": 8, "batch": 8, "seq": 8192, "sharding": "ddp"},
    {"model": "llama-3.1-8b", "method": "lora", "accelerator": "a100", "batch": 8, "seq": 4096},
    {"model": "llama-3.1-70b", "method": "qlora", "accelerator": "rtx-3090", "attention": "eager"},
    {"model": "llama-3.2-1b", "precision": "bf16", "accelerator": "rtx-3090", "seq": 2048, "eval_batch": 32},
    {"model": "8e9", "accelerator": "rtx-4090", "zero_grad": "zero", "accumulation": 4},
    {"model": "llama-3.1-8b", "framework": "torchtune", "precision": "bf16", "accelerator": "a100-40gb"},
    {"model": "llama-3.1-8b", "framework": "hf-trainer+deepspeed", "sharding": "zero2", "accelerators": 4, "seq": 8192, "accelerator": "a100"},
    {"model": "llama-3.1-8b", "accelerator": "h100", "accelerators": 4, "context_parallel": 4, "seq": 8192, "sharding": "ddp"},
    {"model": "llama-3.1-8b", "method": "freeze", "trainable_layers": 16, "accelerator": "rtx-3090"},
]  # fmt: skip
REQUEST = RunRequest(reserve_bytes=2**30)


def asked(values: dict[str, Any]) -> Estimate:
    return estimate(Setup(**values), request=REQUEST, remedies=True)


def changed(result: Estimate, remedy: Remedy) -> Setup:
    """The setup that a remedy proposes, as one would write it."""
    settings = dict(remedy.change)
    if "accelerators" in settings:
        settings |= {"data_parallel": None}
    return dataclasses.replace(result.setup, **settings)


@pytest.mark.parametrize("values", TOO_LARGE, ids=str)
def test_a_remedy_says_what_the_estimate_of_its_setup_says(values: dict[str, Any]) -> None:
    result = asked(values)
    assert result.fits.fits is False and result.remedies
    for remedy in result.remedies:
        there = estimate(changed(result, remedy), request=REQUEST)
        assert remedy.peak_device_bytes == there.memory.peak_device_bytes.value, remedy.flags
        assert remedy.fits is there.fits.fits, remedy.flags
        assert remedy.saved_bytes == result.memory.peak_device_bytes.value - remedy.peak_device_bytes
        if remedy.slower is not None:
            assert there.time is not None and result.time is not None
            seconds = there.time.step_seconds.value / there.setup.tokens_per_step
            now = result.time.step_seconds.value / result.setup.tokens_per_step
            assert remedy.slower == pytest.approx(seconds / now)


@pytest.mark.parametrize("values", TOO_LARGE, ids=str)
def test_something_that_fits_is_found(values: dict[str, Any]) -> None:
    assert asked(values).remedies[0].fits


@pytest.mark.parametrize("values", TOO_LARGE, ids=str)
def test_nothing_is_proposed_twice_or_that_is_on_already(values: dict[str, Any]) -> None:
    result = asked(values)
    now = result.setup.as_dict()
    assert len({remedy.flags for remedy in result.remedies}) == len(result.remedies)
    for remedy in result.remedies:
        assert all(now[name] != value for name, value in remedy.change if name != "sharding"), remedy.flags
        assert remedy.fits or remedy.saved_bytes > 0


@pytest.mark.parametrize("values", TOO_LARGE, ids=str)
def test_a_step_keeps_its_tokens_unless_devices_are_added(values: dict[str, Any]) -> None:
    result = asked(values)
    for remedy in result.remedies:
        if "accelerators" not in dict(remedy.change):
            assert changed(result, remedy).tokens_per_step == result.setup.tokens_per_step, remedy.flags


def test_what_fits_comes_first_then_what_keeps_the_result_then_the_fastest_then_what_saves_most() -> None:
    for values in TOO_LARGE:
        keys = [
            (
                not remedy.fits,
                bool(remedy.note),
                float("inf") if remedy.slower is None else max(1.0, round(remedy.slower, 2)),
                dict(remedy.change).get("accelerators", 0),
                -remedy.saved_bytes,
            )
            for remedy in asked(values).remedies
        ]
        assert keys == sorted(keys)


def test_adapters_and_lower_precision_say_what_they_change() -> None:
    notes = {remedy.flags: remedy.note for remedy in asked(TOO_LARGE[0]).remedies}
    assert notes["--method lora"] == "trains adapters only"
    assert notes["--precision bf16"] and notes["--method qlora"]
    assert not notes["--checkpointing full"]


def test_checkpointing_costs_about_a_forward_pass() -> None:
    remedy = next(r for r in asked(TOO_LARGE[0]).remedies if r.flags == "--checkpointing full")
    assert remedy.slower is not None and 1.1 < remedy.slower < 1.4


def test_several_together_are_proposed_where_no_pair_is_enough() -> None:
    result = asked(TOO_LARGE[2])
    best = result.remedies[0]
    assert len(best.flags.split("--")) > 3 and best.fits and not best.note


def test_more_devices_and_larger_ones_are_proposed_where_nothing_else_keeps_the_result() -> None:
    flags = [remedy.flags for remedy in asked(TOO_LARGE[1]).remedies if remedy.fits]
    assert any(flag.startswith("--gpus ") and "--sharding fsdp" in flag for flag in flags)
    assert any(flag.startswith("--gpu ") for flag in flags)


def test_where_it_fits_or_nobody_asked_there_are_none() -> None:
    assert asked({"model": "nano", "accelerator": "rtx-3090"}).remedies == ()
    assert asked({"model": "8e9"}).remedies == ()
    assert estimate(Setup(**TOO_LARGE[0])).remedies == ()


def test_a_batch_without_end_is_judged_at_once() -> None:
    result = asked({"model": "nano", "accelerator": "rtx-3090", "batch": 10**9})
    assert dict(result.remedies[0].change)["batch"] < 10**9


def test_without_a_rate_the_price_in_time_is_not_guessed() -> None:
    result = estimate(
        Setup(model="base", precision="fp32", batch=64, accelerator="cpu"), capacity_bytes=2**34, remedies=True
    )
    assert result.remedies and all(remedy.slower is None for remedy in result.remedies)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_remedies_of_a_dry_run_are_borne_out_by_dry_runs() -> None:
    # The story's card and batch: fragments keep 8 sequences from fitting, and the formula alone does not know it.
    pytest.importorskip("torch")
    setup = Setup(
        model="qwen1.5-0.5b", precision="fp16-mixed", optimizer="adamw", batch=8, seq=512, accelerator="rtx-3090"
    )
    request = RunRequest(reserve_bytes=2 * 2**30)
    assert estimate(setup, request=request, remedies=True).remedies == ()
    result = estimate(setup, request=request, dry_run=True, remedies=True)
    proposed = {remedy.flags: remedy for remedy in result.remedies}
    assert "--optimizer adamw-fused" not in proposed  # the square roots are not in the peak
    for flags in ("--checkpointing full", "--batch 4 --accumulation 2", "--precision bf16"):
        there = estimate(changed(result, proposed[flags]), request=request, dry_run=True)
        assert there.fits.fits is proposed[flags].fits is True
        assert there.memory.peak_device_bytes.value == pytest.approx(proposed[flags].peak_device_bytes, rel=0.12)
