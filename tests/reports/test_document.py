import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from estimator.result import Estimate
from estimator.setup import Setup
from estimator.units import Interval
from reports.document import estimate_document, render_json

# The keys of the contract `vramcalc/estimate/1`, as docs and other programs have them.
CONTRACT: dict[str, Any] = {
    "schema": None,
    "setup": None,
    "model": {"parameters", "trainable_parameters"},
    "memory": {
        "method", "phase", "parts_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes",
        "peak_host_bytes",
    },
    "fits": {"gpu", "capacity_bytes", "fits", "margin_bytes"},
    "time": {
        "step_seconds", "tokens_per_second", "tokens_per_second_per_gpu", "model_flops_per_step", "mfu", "parts_seconds",
    },
    "checkpoint": {"bytes", "model_bytes", "optimizer_bytes", "run_disk_bytes"},
    "run": {"steps", "tokens", "hours", "gpu_hours", "cost_usd", "energy_kwh"},
    "naive": {"base", "vram_bytes", "years"},
}  # fmt: skip


def test_the_document_has_every_key_of_the_contract(estimate: Estimate) -> None:
    document = json.loads(render_json(estimate_document(estimate)))
    assert document["schema"] == "vramcalc/estimate/1"
    for section, keys in CONTRACT.items():
        assert section in document
        assert (keys or set()) <= set(document[section] if keys else ())


def test_the_keys_stay_where_nothing_is_known_of_time_and_run(estimate: Estimate) -> None:
    document = estimate_document(dataclasses.replace(estimate, time=None, run=None))
    for section in ("time", "run"):
        assert set(document[section]) >= CONTRACT[section]
        assert set(document[section].values()) == {None}


def test_parts_are_integers_that_sum_exactly_to_the_allocated_peak(estimate: Estimate) -> None:
    memory = estimate_document(estimate)["memory"]
    assert all(type(amount) is int for amount in memory["parts_bytes"].values())
    assert sum(memory["parts_bytes"].values()) == memory["peak_allocated_bytes"]["value"]


def test_a_part_that_holds_nothing_at_the_peak_is_zero_rather_than_missing(estimate: Estimate) -> None:
    assert estimate_document(estimate)["memory"]["parts_bytes"]["communication"] == 0


def test_two_parts_of_one_name_are_added(estimate: Estimate) -> None:
    first = estimate.memory.parts[0]
    half = dataclasses.replace(first, amount=first.amount / 2)
    memory = dataclasses.replace(estimate.memory, parts=(half, half, *estimate.memory.parts[1:]))
    document = estimate_document(dataclasses.replace(estimate, memory=memory))
    assert document["memory"]["parts_bytes"][first.name] == first.amount


def test_parts_that_do_not_sum_are_refused(estimate: Estimate) -> None:
    memory = dataclasses.replace(estimate.memory, parts=estimate.memory.parts[1:])
    with pytest.raises(AssertionError):
        estimate_document(dataclasses.replace(estimate, memory=memory))


def test_every_uncertain_value_has_its_interval_around_it(estimate: Estimate) -> None:
    document = estimate_document(estimate)
    values = [document["memory"][name] for name in document["memory"] if name.startswith("peak_")]
    values += [document["time"][name] for name in ("step_seconds", "tokens_per_second", "mfu")]
    values += [document["run"][name] for name in ("hours", "gpu_hours", "cost_usd", "energy_kwh")]
    for value in values:
        assert set(value) == {"value", "low", "high"}
        assert value["low"] <= value["value"] <= value["high"]


def test_bounds_of_bytes_are_rounded_outwards(estimate: Estimate) -> None:
    interval = Interval(value=float(estimate.memory.peak_allocated_bytes.value), low=10.5, high=1e15 + 0.5)
    memory = dataclasses.replace(estimate.memory, peak_device_bytes=interval)
    device = estimate_document(dataclasses.replace(estimate, memory=memory))["memory"]["peak_device_bytes"]
    assert (device["low"], device["high"]) == (10, 10**15 + 1)


def test_the_setup_is_read_back_as_the_same_setup(estimate_of: Callable[[Setup], Estimate]) -> None:
    setup = Setup(model="mini", method="lora", lora_rank=8, seq=512, compile=True)
    document = json.loads(render_json(estimate_document(estimate_of(setup))))
    assert Setup.from_mapping(document["setup"]) == setup.resolved()


def test_infinity_is_refused_because_json_has_none() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        render_json({"value": float("inf")})
