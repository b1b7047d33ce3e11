"""The full fine-tune: estimate, refuse or train, on this process's device or on several, and compare what was predicted."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from estimator.building.model import is_pretrained
from estimator.errors import DoesNotFitError, InputError, MissingError
from estimator.model.catalog import resolve_model
from estimator.model.hub import settle_for_the_cache_without_a_network
from estimator.result import Estimate
from estimator.setup import Setup
from harness.child_errors import explain_error
from harness.cuda_process import settle_allocator
from harness.data import TokenData, load_tokens
from harness.forecast import forecast, refuse_what_does_not_fit
from harness.meters import memory_meter
from harness.plan import TrainPlan, claim_identity, run_identity, schedule
from harness.run_directory import RESULT_FILE, forget_run, run_directory
from harness.samples import find_source
from harness.several import check_trainable
from harness.train_outcome import Run
from harness.train_rank import TrainProgress, train_rank
from harness.train_result import TrainResult, read_result
from harness.world import ALONE, World, agreed, joined_world, process_group
from profiler.device import LocalDevice, local_device, usable_cores

if TYPE_CHECKING:
    from estimator.calibration.fitting import Calibration

__all__ = ["TrainProgress", "train"]


def train(
    plan: TrainPlan,
    *,
    on_estimate: Callable[[Estimate], None] = lambda _: None,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
    calibration: Calibration | None = None,
    calibration_name: str | None = None,
) -> TrainResult:
    """Trains ``plan`` to its end, from its last complete checkpoint if there is one; a finished run is only read.

    Several accelerators are processes of their own, started here, or those that ``torchrun`` started, of which this is one:
    then the first speaks and writes, and all return the result. On a CPU, and with the same number of threads, a run of one
    device that was killed and resumed has the losses and weights of one that was not, to the last bit. Raises InputError
    before any work for what cannot be run or read, DoesNotFitError for what does not fit in memory or on the disk
    (beforehand unless ``plan.force``, or when it runs out), MissingError, RankError.
    """
    # As profiled points run, from which step times are predicted; it counts only before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    joined = joined_world()
    world = joined or ALONE
    device = local_device()
    plan = dataclasses.replace(plan, setup=_local_setup(plan.setup, device))
    if is_pretrained(plan.setup.model):
        settle_for_the_cache_without_a_network()
    resolve_model(plan.setup.model)
    _check(plan.setup, device, joined)
    find_source(plan.data, cache=plan.cache)
    with run_directory(plan.out) if world.is_main else contextlib.nullcontext():
        run = _prepared(plan, _shared(device, plan.setup), calibration, calibration_name)
        meter = None
        launches = joined is None and plan.setup.accelerators > 1
        if world.is_main:
            on_estimate(run.predicted)
        if device.kind == "cuda":
            settle_allocator(plan.setup)
            if not launches:
                # What the GPU holds now is others': made before Trainer's arguments, which initialise CUDA.
                meter = memory_meter(device, world.local_rank)
        # Not before: it loads torch and transformers, and what is wrong so far is said at once.
        _check_arguments(plan, device, launches=launches)
        finished = world.is_main and _begin(run)
        if launches:
            if not finished:
                _explained(lambda: _launch(run, on_progress))
            return read_result(plan.out / RESULT_FILE)
        with process_group(world, device.kind):
            if not agreed(world, finished):
                _explained(lambda: train_rank(run, world, on_progress=on_progress, meter=meter))
            result: TrainResult = agreed(world, read_result(plan.out / RESULT_FILE) if world.is_main else None)
            return result


def _prepared(plan: TrainPlan, device: LocalDevice, calibration: Calibration | None, name: str | None) -> Run:
    data = _tokens(plan)
    steps = schedule(plan, data)
    predicted = forecast(plan, steps, device, calibration=calibration, calibration_name=name)
    return Run(plan=plan, setup=plan.setup, device=device, data=data, steps=steps, predicted=predicted)


def _tokens(plan: TrainPlan) -> TokenData:
    return load_tokens(
        plan.data,
        model=plan.setup.model,
        seq=plan.setup.seq,
        pack=plan.setup.pack,
        sequences=None,
        cache=plan.cache,
        prompt_format=plan.prompt_format,
        seed=plan.seed,
    )


def _begin(run: Run) -> bool:
    """Refuses what does not fit, and claims the directory; whether it holds this very run, finished."""
    plan = run.plan
    if not plan.force:
        refuse_what_does_not_fit(run.predicted, plan.out)
    if plan.restart:
        forget_run(plan.out)
    known = claim_identity(plan.out, run_identity(plan, run.steps, run.data))
    return known and (plan.out / RESULT_FILE).exists()


def _explained(train: Callable[[], None]) -> None:
    try:
        train()
    except (MemoryError, RuntimeError, OSError) as error:
        kind, reason = explain_error(error)
        if kind == "oom":
            raise DoesNotFitError(
                f"memory: the training ran out of it ({reason}); write a smaller --batch or --seq, "
                "--checkpointing full or --method lora"
            ) from error
        raise


def _launch(run: Run, on_progress: Callable[[TrainProgress], None]) -> None:
    from harness.launch import launch

    launch(_launched, run.plan, run.device, run.predicted, ranks=run.setup.accelerators, on_message=on_progress)


def _launched(
    world: World, send: Callable[[TrainProgress], None], plan: TrainPlan, device: LocalDevice, predicted: Estimate
) -> None:
    """One of the processes that ``_launch`` starts; it finds the tokens in the cache."""
    meter = memory_meter(device, world.local_rank) if device.kind == "cuda" else None
    data = _tokens(plan)
    run = Run(plan=plan, setup=plan.setup, device=device, data=data, steps=schedule(plan, data), predicted=predicted)
    with process_group(world, device.kind):
        train_rank(run, world, on_progress=send, meter=meter)


def _local_setup(setup: Setup, device: LocalDevice) -> Setup:
    if setup.accelerator is not None and setup.accelerator.lower() != device.name.lower():
        raise InputError(
            f"accelerator: {setup.accelerator} is not what this machine has ({device.name}); leave out --gpu"
        )
    return dataclasses.replace(setup, accelerator=device.name, eval_batch=setup.eval_batch or setup.batch).resolved()


def _check(setup: Setup, device: LocalDevice, joined: World | None) -> None:
    """What no step here executes, and more devices than there are."""
    if joined is not None and joined.size != setup.accelerators:
        raise InputError(
            f"accelerators: {joined.size} processes were started for {setup.accelerators}; write --gpus {joined.size}"
        )
    check_trainable(setup)
    here = 1 if setup.accelerators == 1 else _devices(device)
    if joined is None and setup.accelerators > here:
        raise MissingError(
            f"accelerators: this machine has {here} ({device.name}), not {setup.accelerators}; write --gpus {here}, or start "
            "the same command with torchrun on as many machines as have them"
        )


def _devices(device: LocalDevice) -> int:
    """GPUs that a process may use, or CPU cores."""
    if device.kind != "cuda":
        return usable_cores()
    import torch

    return torch.cuda.device_count()


def _shared(device: LocalDevice, setup: Setup) -> LocalDevice:
    """One rank's part: processes on a CPU share its memory, GPUs have their own."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", setup.accelerators))
    if device.kind != "cpu" or local == 1:
        return device
    return dataclasses.replace(
        device, capacity_bytes=device.capacity_bytes // local, free_bytes=device.free_bytes // local
    )


def _check_arguments(plan: TrainPlan, device: LocalDevice, *, launches: bool) -> None:
    """What the loop or Trainer would refuse, before anything is built or kept."""
    if plan.setup.framework == "torch-loop":
        from harness.torch_loop import check_loop

        check_loop(plan.setup)
        return
    from harness.trainer import check_trainer, training_arguments

    if launches:  # the arguments themselves would take a GPU that is a rank's
        check_trainer(plan.setup, cuda=device.kind == "cuda")
    else:
        training_arguments(plan.setup, output_dir=plan.out)
