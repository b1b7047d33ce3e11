"""Executes a setup's steps on fake tensors: the model placed on a device without memory, the contexts around it, and the loop
that its framework has. Loads torch on import."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from estimator.building.model import build_empty_model, decoder_layers, weight_dtype
from estimator.conventions import splits_by_own_plan
from estimator.dryrun.compiled import compile_layers
from estimator.dryrun.cuda_kernels import CudaFunctions
from estimator.dryrun.events import Stream
from estimator.dryrun.experts import grouped_products
from estimator.dryrun.flex import compiled_flex_attention
from estimator.dryrun.loop import Loop
from estimator.dryrun.offload import offload_activations
from estimator.dryrun.private_api import fake_mode, replaced
from estimator.dryrun.reference_code import reference_code
from estimator.dryrun.tracker import Tracker
from estimator.hardware import is_cpu, workspace_bytes
from estimator.memory.activations import builds_mask
from estimator.memory.states import keeps_master_weights
from estimator.setup import Setup

__all__ = ["Loop", "record"]


def record(
    setup: Setup, *, steps: int, layers: Sequence[int] | None, count: Callable[[Tracker], Any] = contextlib.nullcontext
) -> Stream:
    """The events of ``steps`` optimizer steps of ``setup`` (resolved), with its model cut to these of its decoder ``layers``.

    The model is built without weights, its parameters arriving on the device in the order of ``Module.to``.
    ``count`` makes a mode of the tracker that sees each operator below it. Raises InputError as ``build_model``.
    """
    cpu = is_cpu(setup.accelerator)
    engine = keeps_master_weights(setup)
    if engine:  # which runs a model that is half throughout, without autocast
        setup = dataclasses.replace(setup, precision=setup.precision.removesuffix("-mixed"))
    if setup.context_parallel > 1:
        setup = dataclasses.replace(setup, seq=setup.seq // setup.context_parallel)
    model: Any = build_empty_model(setup, layers=layers)
    model.train()
    if engine:
        model.to(weight_dtype(setup))  # peft's adapters were fp32
    if setup.offload == "activations":
        offload_activations(decoder_layers(model), checkpointing=setup.checkpointing != "none")
    with contextlib.ExitStack() as world:
        distributed = setup.sharding == "fsdp" or setup.tensor_parallel > 1
        if distributed:
            from estimator.dryrun.sharded import sharded, watched

            world.enter_context(sharded(model, setup))
        world.enter_context(fake_mode())
        _place(model)
        if setup.compile:
            compile_layers(decoder_layers(model), setup)
        tracker = Tracker(
            model,
            decoder_layers(model),
            vocab=-(
                -model.config.get_text_config().vocab_size
                // (1 if splits_by_own_plan(setup) else setup.tensor_parallel)
            ),
            workspace_bytes=workspace_bytes(setup.accelerator) // 2,
            cuda=not cpu,
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(_no_garbage_collection())
            stack.enter_context(_module_hooks(tracker))
            stack.enter_context(_masks(setup))
            stack.enter_context(grouped_products())
            stack.enter_context(reference_code(model, tracker.stream.packages))
            if setup.attention == "flex":
                stack.enter_context(compiled_flex_attention())
            if not cpu:
                stack.enter_context(CudaFunctions(setup.attention_kernel, compiled=setup.compile))
            if distributed:
                stack.enter_context(watched(tracker, model, setup))
            stack.enter_context(count(tracker))
            stack.enter_context(tracker)
            _loop(setup)(setup, model, tracker, cuda=not cpu).run(steps)
        return tracker.stream


def _loop(setup: Setup) -> type[Loop]:
    if str(setup.sharding).startswith("zero"):
        from estimator.dryrun.deepspeed import DeepSpeedLoop

        return DeepSpeedLoop
    if setup.sharding == "ddp":
        from estimator.dryrun.ddp import DdpLoop

        return DdpLoop
    return Loop


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """When cycles are collected depends on everything that the process did before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _module_hooks(tracker: Tracker) -> Iterator[None]:
    from torch.nn.modules import module as modules

    handles = [
        modules.register_module_forward_pre_hook(tracker.position.enter_module),
        modules.register_module_forward_hook(tracker.position.leave_module, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _masks(setup: Setup) -> Iterator[None]:
    """Whether a batch without padding gets an explicit mask is decided by its values, which fake tensors don't have.

    transformers 4.57 takes a single sequence for a packed one (``builds_mask``), 5 looks and finds that it is not. Where the
    sequence is split, a mask would be of its part.
    """
    from transformers import masking_utils

    explicit = builds_mask(setup) and (setup.batch == 1 or setup.attention_kernel is not None or not setup.pack)
    explicit = explicit and (setup.tensor_parallel == 1 or splits_by_own_plan(setup)) and setup.context_parallel == 1
    if explicit:
        yield
        return
    with replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        yield


def _place(model: torch.nn.Module) -> None:
    """Moves a model from the meta device to the fake one; tensors that modules share stay shared."""
    moved: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            # Of a sharded parameter its shard.
            own = getattr(tensor, "_local_tensor", tensor)
            fresh = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype)
            if own is not tensor:
                sharded: Any = tensor
                fresh = type(sharded)(fresh, sharded._spec, requires_grad=False)
            if isinstance(tensor, torch.nn.Parameter):
                fresh = torch.nn.Parameter(fresh, requires_grad=tensor.requires_grad)
            moved[id(tensor)] = fresh
        return moved[id(tensor)]

    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for own in tables:
            for name, value in own.items():
                if isinstance(value, torch.Tensor):
                    own[name] = move(value)
