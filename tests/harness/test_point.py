"""One profiled point, trained for real on a model of 1.2M parameters, against counts made another way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from estimator.building.model import build_model
from estimator.errors import InputError, MissingError
from estimator.measured import MEASUREMENTS, MeasuredRun
from estimator.memory.checkpoint import checkpoint_estimate
from estimator.model.catalog import resolve_model
from estimator.setup import Setup
from harness.fork_server import CallEndedError, ForkServer, Limits
from harness.point import Procedure, check_points, local_setup, run_key, run_point, unfinished_run
from profiler.device import LocalDevice, local_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the figures are those of a CPU")
KIB = 2**10
Measure = Callable[..., MeasuredRun]


@pytest.fixture(scope="module")
def device() -> LocalDevice:
    return local_device()


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="module")
def measure(
    server: ForkServer, device: LocalDevice, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Measure]:
    """Runs nano at 64 tokens with the settings given, each combination once."""
    found: dict[str, MeasuredRun] = {}

    def run(*, limits: Limits = Limits(timeout_seconds=300), **settings: Any) -> MeasuredRun:  # noqa: B008
        setup = local_setup(Setup(**({"model": "nano", "seq": 64, "precision": "fp32"} | settings)), device)
        procedure = Procedure(warmup_steps=1, timed_steps=3, cache=cache)
        key = run_key(setup, procedure, device)
        if key not in found:
            scratch = tmp_path_factory.mktemp("scratch")
            log = scratch.with_suffix(".log")
            found[key] = server.call(run_point, setup, procedure, device, scratch, limits=limits, log=log)
            assert list(scratch.iterdir()) == []
        return found[key]

    yield run


def counted(**settings: Any) -> tuple[int, int, int]:
    """(all, trainable) parameters and the bytes of the buffers, counted by torch without memory."""
    with torch.device("meta"):
        model = build_model(Setup(**({"model": "nano", "seq": 64, "precision": "fp32"} | settings)))
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() for p in parameters), trainable, sum(b.numel() * b.element_size() for b in model.buffers())


def test_a_point_fills_every_column_that_a_cpu_can_measure(measure: Measure) -> None:
    run = measure()
    elsewhere = {
        "reason", "peak_unstated_bytes", "peak_host_bytes", "stated_mfu", "energy_joules", "final_loss", "kernels", "notes",
    }  # fmt: skip
    empty = {name for name in MEASUREMENTS if getattr(run, name) is None}
    assert empty <= elsewhere
    assert (run.outcome, run.grade, run.global_batch, run.timed_steps) == ("ok", "A+", 1, 3)
    assert run.source.startswith("vramcalc profile: ")
    assert run.setup.as_dict() | {"accelerator": "cpu", "optimizer": "adamw-fused"} == run.setup.as_dict()
    facts = json.loads(run.environment or "")
    assert (facts["traced_steps"], facts["warmup_steps"], facts["timed_steps"]) == (2, 1, 3)


def test_parameters_and_loaded_bytes_are_those_that_torch_counts(measure: Measure) -> None:
    parameters, trainable, buffers = counted()
    run = measure()
    assert (run.parameters, run.trainable_parameters) == (parameters, trainable)
    assert run.loaded_bytes == 4 * parameters + buffers


def test_adapters_count_in_all_and_alone_in_what_trains(measure: Measure) -> None:
    run = measure(method="lora", lora_rank=4)
    parameters, trainable, _ = counted(method="lora", lora_rank=4)
    assert (run.parameters, run.trainable_parameters) == (parameters, trainable)
    assert trainable < parameters / 20


def test_fused_adamw_holds_four_copies_of_fp32_weights_and_foreach_five(measure: Measure) -> None:
    """Weights, gradients, two states; foreach makes a temporary of all of them. A few kB of scalars and the batch."""
    parameters, _, buffers = counted()
    copy = 4 * parameters
    for optimizer, copies in (("adamw-fused", 4), ("adamw", 5)):
        run = measure(framework="torch-loop", optimizer=optimizer)
        assert run.peak_optimizer_bytes is not None
        assert 0 <= run.peak_optimizer_bytes - copies * copy - buffers < 8 * KIB


def test_bf16_halves_what_the_optimizer_holds(measure: Measure) -> None:
    full, half = (measure(framework="torch-loop", optimizer="adamw-fused", precision=p) for p in ("fp32", "bf16"))
    assert full.peak_optimizer_bytes is not None and half.peak_optimizer_bytes is not None
    assert half.peak_optimizer_bytes / full.peak_optimizer_bytes == pytest.approx(0.5, abs=0.002)


def test_more_tokens_need_more(measure: Measure) -> None:
    short, long = measure().peak_allocated_bytes, measure(seq=512).peak_allocated_bytes
    assert short is not None and long is not None
    assert short < long


def test_the_peak_is_the_highest_of_the_phases_and_names_it(measure: Measure) -> None:
    for settings in ({}, {"seq": 512}, {"method": "lora", "lora_rank": 4}, {"framework": "torch-loop"}):
        run = measure(**settings)
        phases = {
            "forward": run.peak_forward_bytes or 0,
            "backward": run.peak_backward_bytes or 0,
            "optimizer": run.peak_optimizer_bytes or 0,
        }
        assert run.peak_allocated_bytes == max(phases.values()) == phases[str(run.peak_phase)]


def test_device_holds_more_than_reserved_and_reserved_more_than_allocated(measure: Measure) -> None:
    run = measure(seq=512)
    assert run.peak_allocated_bytes and run.peak_reserved_bytes and run.peak_device_bytes
    assert run.peak_allocated_bytes < run.peak_reserved_bytes < run.peak_device_bytes


@pytest.mark.parametrize("framework", ["hf-trainer", "torch-loop"])
def test_a_checkpoint_is_the_weights_and_two_states_each_written_once(measure: Measure, framework: str) -> None:
    parameters, _, _ = counted()
    run = measure(framework=framework)
    assert run.checkpoint_bytes and run.checkpoint_model_bytes and run.checkpoint_optimizer_bytes
    assert run.checkpoint_model_bytes == pytest.approx(4 * parameters, rel=0.005)
    assert run.checkpoint_optimizer_bytes == pytest.approx(8 * parameters, rel=0.005)
    rest = run.checkpoint_bytes - run.checkpoint_model_bytes - run.checkpoint_optimizer_bytes
    assert 0 < rest < 40 * KIB
    assert run.checkpoint_seconds is not None and run.checkpoint_seconds > 0


def test_tokens_a_second_are_the_tokens_of_a_step_over_its_median(measure: Measure) -> None:
    run = measure(batch=2, accumulation=3)
    assert run.step_seconds and run.tokens_per_second_per_accelerator
    assert run.tokens_per_second_per_accelerator * run.step_seconds == pytest.approx(2 * 3 * 64)
    assert run.global_batch == 6


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dora", "lora_rank": 4},
        {"method": "freeze", "trainable_layers": 1},
        {"checkpointing": "full"},
        {"precision": "bf16-mixed"},
        {"optimizer": "adafactor"},
        {"optimizer": "sgd"},
        {"pack": False},
        {"attention": "eager"},
        {"model": "nano-llama"},
    ],
    ids=str,
)
@pytest.mark.parametrize("framework", ["hf-trainer", "torch-loop"])
def test_every_way_of_training_gives_a_row(measure: Measure, framework: str, settings: dict[str, Any]) -> None:
    run = measure(framework=framework, **settings)
    assert run.outcome == "ok"
    assert run.trainable_parameters == counted(**settings)[1]
    # Adapters come with peft's README, and the plain loop leaves out Trainer's arguments.
    predicted = checkpoint_estimate(resolve_model(run.setup.model), run.setup).bytes
    assert run.checkpoint_bytes == pytest.approx(predicted, rel=0.015)


def test_checkpointing_and_less_to_train_need_less(measure: Measure) -> None:
    plain = measure(seq=512, batch=2)
    for settings in ({"checkpointing": "full"}, {"method": "lora", "lora_rank": 4}):
        less = measure(seq=512, batch=2, **settings)
        assert less.peak_allocated_bytes and plain.peak_allocated_bytes
        assert less.peak_allocated_bytes < plain.peak_allocated_bytes


def test_the_peaks_of_a_point_are_the_same_every_time(
    server: ForkServer, device: LocalDevice, cache: Path, tmp_path: Path
) -> None:
    setup = local_setup(Setup(model="nano", seq=64, precision="fp32"), device)
    procedure = Procedure(warmup_steps=1, timed_steps=3, cache=cache)
    limits = Limits(timeout_seconds=300)
    runs = [
        server.call(run_point, setup, procedure, device, tmp_path, limits=limits, log=tmp_path / f"{attempt}.log")
        for attempt in range(2)
    ]
    for name in ("peak_forward_bytes", "peak_backward_bytes", "peak_optimizer_bytes", "loaded_bytes"):
        assert len({getattr(run, name) for run in runs}) == 1


def test_a_point_without_enough_memory_runs_out_of_it(measure: Measure) -> None:
    with pytest.raises(CallEndedError) as raised:
        measure(seq=1024, batch=4, limits=Limits(timeout_seconds=300, memory_bytes=100 * 2**20))
    assert raised.value.outcome == "oom"


def test_the_key_of_a_point_changes_with_whatever_is_measured_and_with_nothing_else(
    device: LocalDevice, cache: Path, tmp_path: Path
) -> None:
    setup = local_setup(Setup(model="nano", seq=64), device)
    procedure = Procedure(cache=cache)
    key = run_key(setup, procedure, device)
    same = local_setup(Setup(model="nano", seq=64, accelerator="CPU", optimizer="adamw-fused"), device)
    assert run_key(same, procedure, replace(device, free_bytes=1)) == key
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n')
    others = [
        run_key(replace(setup, seq=65), procedure, device),
        run_key(setup, replace(procedure, timed_steps=6), device),
        run_key(setup, replace(procedure, data=str(data)), device),
        run_key(setup, procedure, replace(device, description="another")),
    ]
    assert len({key, *others}) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accelerator": "h100"}, "accelerator: h100 is not what this machine has"),
        ({"framework": "torchtitan"}, "framework: torchtitan can be estimated but not run here"),
        (
            {"accelerators": 2},
            "sharding: fsdp can be estimated but not run|accelerators: 2 can be estimated but not run",
        ),
        ({"model": "no-such-model"}, "model: 'no-such-model' is not in the catalog"),
        ({"eval_batch": 2}, "eval_batch: a profiled point does not evaluate"),
    ],
)
def test_what_this_machine_cannot_run_is_refused_in_one_line(
    device: LocalDevice, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        local_setup(Setup(**({"model": "nano", "seq": 64} | settings)), device)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"precision": "fp16-mixed"}, InputError, "precision: "),
        ({"precision": "fp16-mixed", "framework": "torch-loop"}, InputError, "precision: "),
        ({"optimizer": "adamw-8bit"}, MissingError, "needs bitsandbytes"),
        ({"optimizer": "adamw-8bit", "framework": "torch-loop"}, InputError, "optimizer: "),
        ({"method": "freeze", "trainable_layers": 99}, InputError, "more than the model's 4 layers"),
        ({"method": "lora", "lora_targets": "nothing"}, InputError, "lora_targets: "),
    ],
)
def test_what_a_loop_or_a_model_does_not_have_is_found_before_any_point_runs(
    device: LocalDevice, cache: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = local_setup(Setup(model="nano", seq=64), device)
    bad = local_setup(Setup(**({"model": "nano", "seq": 64} | settings)), device)
    with pytest.raises(error, match=message):
        check_points((good, bad), Procedure(cache=cache))


def test_data_that_cannot_be_read_is_found_before_any_point_runs(
    device: LocalDevice, cache: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{not json\n")
    with pytest.raises(InputError, match=r"broken\.jsonl"):
        check_points((local_setup(Setup(model="nano", seq=64), device),), Procedure(data=str(broken), cache=cache))


@pytest.mark.parametrize("name", ["warmup_steps", "timed_steps"])
def test_a_procedure_without_steps_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: 0 is too few; write --{name.replace('_', '-')} 1 or more"):
        Procedure(**{name: 0})


def test_an_unfinished_point_is_a_row_of_the_same_key(device: LocalDevice, cache: Path) -> None:
    setup, procedure = local_setup(Setup(model="nano", seq=64), device), Procedure(cache=cache)
    run = unfinished_run(setup, procedure, device, outcome="timeout", reason="took longer than 1 s")
    assert run.run == run_key(setup, procedure, device)
    assert (run.outcome, run.reason, run.peak_allocated_bytes) == ("timeout", "took longer than 1 s", None)
