"""One profiled point: a short real fine-tune, measured, as one row of the table of measured runs.

The steps of a point, in order: two whose memory is traced (the first allocates the optimizer's state), warm-up steps, timed
steps, a checkpoint. Run it in a fresh process: peaks of the process and of the allocator are in the row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.hardware import CPU, find_accelerator, is_cpu
from estimator.measured import MeasuredRun
from estimator.model.catalog import resolve_model
from estimator.setup import Setup
from estimator.speed.compute import step_work
from harness.point_steps import TRACED_STEPS, Watch, build_for, point_meter, train_point
from harness.samples import find_source
from profiler.device import LocalDevice, usable_cores
from profiler.environment import environment_json, version

PROCEDURE_VERSION = 1
"""Part of a row's key: raise it when the same setup would be measured otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Procedure:
    """How points are measured; the same for all of a sweep."""

    data: str | None = None
    """What ``--data`` names; ``None`` is the offline set."""
    warmup_steps: int = 2
    timed_steps: int = 5
    checkpoint_limit_bytes: int | None = None
    """A checkpoint that the estimate says is larger is not written, and its columns stay empty; ``None`` writes all."""
    cache: Path | None = None
    """Where tokens are kept; ``None`` is the user's cache directory."""

    def __post_init__(self) -> None:
        # Without the profiler, the warm-up steps are what the allocator and the resident set are read of.
        for name in ("warmup_steps", "timed_steps"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{name}: {getattr(self, name)} is too few; write {flag} 1 or more")

    @property
    def steps(self) -> int:
        return TRACED_STEPS + self.warmup_steps + self.timed_steps


def local_setup(setup: Setup, device: LocalDevice) -> Setup:
    """The setup as this device runs it, every default written out. Raises InputError for what no step here executes."""
    from estimator.building.model import check_buildable

    if setup.accelerator is not None and _canonical(setup.accelerator) != device.name:
        raise InputError(
            f"accelerator: {setup.accelerator} is not what this machine has ({device.name}); leave out --gpu"
        )
    if setup.framework not in ("hf-trainer", "torch-loop"):
        raise InputError(
            f"framework: {setup.framework} can be estimated but not run here; write hf-trainer or torch-loop"
        )
    if setup.eval_batch is not None:
        raise InputError("eval_batch: a profiled point does not evaluate; leave it out")
    resolve_model(setup.model)
    resolved = replace(setup, accelerator=device.name).resolved()
    check_buildable(resolved)
    return resolved


def _canonical(accelerator: str) -> str:
    return CPU if is_cpu(accelerator) else find_accelerator(accelerator).name


def run_key(setup: Setup, procedure: Procedure, device: LocalDevice) -> str:
    """Identifies a row: the same resolved setup, data, procedure and machine always give the same key.

    The data count by what ``find_source`` identifies them by (a file's path, size and time of change). Neither library
    versions nor limits are in it: a sweep that is resumed after an upgrade does not start over.
    """
    identity = {
        "setup": setup.as_dict(),
        "data": find_source(procedure.data, cache=procedure.cache).identity,
        "procedure": [PROCEDURE_VERSION, procedure.warmup_steps, procedure.timed_steps],
        "device": [device.name, device.description, usable_cores(), device.capacity_bytes],
    }
    return "p" + hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def source_label(device: LocalDevice) -> str:
    """The ``source`` column: names the kind of machine, not the machine."""
    return f"vramcalc profile: {device.description}, {usable_cores()} cores"


def unfinished_run(
    setup: Setup, procedure: Procedure, device: LocalDevice, *, outcome: str, reason: str
) -> MeasuredRun:
    """The row of a point that gave no answer: ``oom``, ``failed`` or ``timeout`` and why."""
    return MeasuredRun(
        run=run_key(setup, procedure, device),
        setup=setup,
        source=source_label(device),
        outcome=outcome,
        reason=reason,
        global_batch=setup.batch * setup.accumulation,
        torch=version("torch"),
        transformers=version("transformers"),
    )


def check_points(setups: Sequence[Setup], procedure: Procedure) -> None:
    """What would keep points from running, found before the first one runs; and the tokens that they need, cached.

    Call it in a process of its own: it imports torch. Raises InputError for settings that the loop or the model does
    not have and for data that cannot be read, and MissingError for a package.
    """
    import torch

    from estimator.building.model import build_model, is_pretrained
    from harness.data import load_tokens
    from harness.torch_loop import check_loop
    from harness.trainer import training_arguments

    longest: dict[tuple[str, bool], int] = {}
    for setup in setups:
        if setup.framework == "torch-loop":
            check_loop(setup)
        else:
            training_arguments(setup, output_dir=Path("unused"))
        if not is_pretrained(setup.model):
            with torch.device("meta"):  # shapes without memory
                build_model(setup)
        longest[setup.model, setup.pack] = max(longest.get((setup.model, setup.pack), 1), setup.seq)
    for (model, pack), seq in longest.items():
        load_tokens(procedure.data, model=model, seq=seq, pack=pack, sequences=None, cache=procedure.cache)


def run_point(
    setup: Setup, procedure: Procedure, device: LocalDevice, scratch: Path, trace: Path | None = None
) -> MeasuredRun:
    """Trains ``setup`` (from ``local_setup``) for ``procedure.steps`` steps and writes one checkpoint under ``scratch``.

    On a GPU, ``trace`` gets the allocator's trace of the traced steps (see ``profiler.allocator_recording``). Changes the
    process's random state, allocator and memory; leaves nothing in ``scratch``. Raises InputError and MissingError; an
    allocation that fails raises what the library raises.
    """
    from harness.cuda_process import attention_held_to, chosen_attention, settle_allocator
    from harness.data import load_tokens

    on_gpu = device.kind == "cuda"
    if on_gpu:
        settle_allocator(setup)
    sequences = setup.batch * setup.accumulation * procedure.steps
    tokens = load_tokens(
        procedure.data,
        model=setup.model,
        seq=setup.seq,
        pack=setup.pack,
        sequences=sequences,
        cache=procedure.cache,
    )
    meter = point_meter(device, trace, source=f"{source_label(device)}, {run_key(setup, procedure, device)}")
    model = build_for(setup, device)
    parameters, trainable = _count(model)
    watch = Watch(meter, device, procedure)
    with attention_held_to(setup.attention_kernel if on_gpu else None):
        checkpoint = train_point(setup, model, tokens, watch, procedure, scratch)
        peaks = meter.stop()
        further = {**meter.facts(), "sdpa_kernel": chosen_attention(setup)} if on_gpu else {}
    times = watch.times()
    tokens_per_step = setup.seq * setup.batch * setup.accumulation
    model_flops = step_work(resolve_model(setup.model), setup).model_flops
    return MeasuredRun(
        run=run_key(setup, procedure, device),
        setup=setup,
        source=source_label(device),
        grade="A+",
        outcome="ok",
        parameters=parameters,
        trainable_parameters=trainable,
        peak_allocated_bytes=peaks.allocated_bytes,
        peak_reserved_bytes=peaks.reserved_bytes,
        peak_device_bytes=peaks.device_bytes,
        peak_host_bytes=_host_peak(device),
        peak_phase=peaks.peak_phase,
        peak_forward_bytes=peaks.of("forward"),
        peak_backward_bytes=peaks.of("backward"),
        peak_optimizer_bytes=peaks.of("optimizer"),
        loaded_bytes=peaks.loaded_bytes,
        step_seconds=times.median_seconds,
        step_seconds_spread=times.spread,
        timed_steps=len(times.seconds),
        tokens_per_second_per_accelerator=tokens_per_step / times.median_seconds,
        model_tflops_per_accelerator=model_flops / times.median_seconds / 1e12,
        energy_joules=watch.joules_per_step(),
        **checkpoint,
        global_batch=setup.batch * setup.accumulation,
        torch=version("torch"),
        transformers=version("transformers"),
        environment=environment_json(
            device,
            data=tokens.name,
            data_fingerprint=tokens.fingerprint,
            procedure=PROCEDURE_VERSION,
            traced_steps=TRACED_STEPS,
            warmup_steps=procedure.warmup_steps,
            timed_steps=procedure.timed_steps,
            **further,
        ),
    )


def _count(model: Any) -> tuple[int, int]:
    """(all, trainable) parameters; what is packed into fewer numbers counts unpacked, adapters included."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return int(base.num_parameters()), int(base.num_parameters(only_trainable=True))


def _host_peak(device: LocalDevice) -> int | None:
    """On a GPU, the process's peak in host memory; on a CPU that is the device's own figure."""
    if device.kind != "cuda":
        return None
    from profiler.cpu_memory import resident_peak_bytes

    return resident_peak_bytes()
