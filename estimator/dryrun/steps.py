"""The training steps that are dry-run, on fake tensors: the plain loop and transformers' Trainer. Loads torch on import."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import torch

from estimator.activations import builds_mask
from estimator.build import build_empty_model, decoder_layers, model_config, weight_dtype
from estimator.dryrun.compiled import compile_layers, gradients_at_the_end
from estimator.dryrun.cuda_kernels import CudaFunctions
from estimator.dryrun.events import Stream
from estimator.dryrun.flex import compiled_flex_attention
from estimator.dryrun.offload import offload_activations
from estimator.dryrun.optimizers import build_optimizer
from estimator.dryrun.private_api import fake_mode, replaced, run_backward
from estimator.dryrun.tracker import Tracker
from estimator.hardware import is_cpu, workspace_bytes
from estimator.setup import Setup
from estimator.states import keeps_master_weights


def record(setup: Setup, *, steps: int, layers: int | None) -> Stream:
    """The events of ``steps`` optimizer steps of ``setup`` (resolved), with its model cut to ``layers`` decoder layers.

    The model is built without weights, its parameters arriving on the device in the order of ``Module.to``.
    Raises InputError as ``build_model``.
    """
    cpu = is_cpu(setup.accelerator)
    engine = keeps_master_weights(setup)
    if engine:  # which runs a model that is half throughout, without autocast
        setup = dataclasses.replace(setup, precision=setup.precision.removesuffix("-mixed"))
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
            vocab=-(-model.config.get_text_config().vocab_size // setup.tensor_parallel),
            workspace_bytes=workspace_bytes(setup.accelerator) // 2,
            cuda=not cpu,
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(_no_garbage_collection())
            stack.enter_context(_module_hooks(tracker))
            stack.enter_context(_masks(setup))
            stack.enter_context(_experts())
            if setup.attention == "flex":
                stack.enter_context(compiled_flex_attention())
            if not cpu:
                stack.enter_context(CudaFunctions(setup.attention_kernel))
            if distributed:
                stack.enter_context(watched(tracker))
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


def depth(setup: Setup) -> int:
    """Decoder layers of the setup's model. Raises InputError as ``model_config``."""
    return int(model_config(setup).get_text_config().num_hidden_layers)


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
        modules.register_module_forward_pre_hook(tracker.enter_module),
        modules.register_module_forward_hook(tracker.leave_module, always_call=True),
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

    explicit = builds_mask(setup) and (setup.batch == 1 or setup.attention_kernel is not None)
    explicit = explicit and setup.tensor_parallel == 1
    if explicit:
        yield
        return
    with replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        yield


@contextlib.contextmanager
def _experts() -> Iterator[None]:
    """Mixtures of experts multiply in groups; torch's own product knows no shapes but those of bf16, and transformers' stand-in
    for it, which returns and keeps the same, knows all."""
    from transformers.integrations import moe

    def bf16(_: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
        return weight.dtype == torch.bfloat16

    with replaced(moe, "_can_use_grouped_mm", bf16):
        yield


class Loop:
    """One model and its optimizer, stepping. ``setup`` resolved."""

    def __init__(self, setup: Setup, model: Any, tracker: Tracker, *, cuda: bool) -> None:
        self._setup, self._model, self._tracker, self._cuda = setup, model, tracker, cuda
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer: torch.optim.Optimizer | None = None
        self._half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            setup.autocast or {"bf16-mixed": "bf16", "fp16-mixed": "fp16"}.get(setup.precision, "")
            if setup.sharding != "fsdp"  # whose gathered weights are half themselves
            else ""
        )

    def run(self, steps: int) -> None:
        tracker = self._tracker
        tracker.begin("load")
        self._load()
        ids = torch.empty(self._setup.batch, self._setup.seq, dtype=torch.int64)
        tracker.recategorize(ids, "activations", "the batch")
        if self._setup.optimizer_in_backward:
            for parameter in self._trained:
                self._step_in_backward(parameter)
        for _ in range(steps):
            for number in range(self._setup.accumulation):
                if self._setup.sharding == "fsdp" and self._setup.framework == "hf-trainer":
                    # accelerate's ``no_sync``: what is not the last micro-batch is added up whole, on each rank.
                    self._model.set_requires_gradient_sync(number + 1 == self._setup.accumulation)
                if self._setup.framework == "torch-loop":
                    self._plain_micro_batch(ids)
                else:
                    self._trainer_micro_batch(ids)
            if not self._setup.optimizer_in_backward:
                tracker.begin("optimizer")
                self._step()
            tracker.begin("between")
        del ids
        if self._setup.eval_batch is not None:
            self._evaluate(self._setup.eval_batch)

    def _load(self) -> None:
        _load(self._model, self._tracker)

    def _evaluate(self, sequences: int) -> None:
        """``Trainer.prediction_step`` with ``prediction_loss_only``: the outputs, logits included, live until it returns."""
        self._model.eval()
        self._tracker.begin("evaluation")
        ids = torch.empty(sequences, self._setup.seq, dtype=torch.int64)
        self._tracker.recategorize(ids, "activations", "the batch")
        with torch.no_grad():
            outputs = self._outputs(ids)
            del outputs
        self._tracker.begin("between")
        self._model.train()

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        if self._half is None:
            yield
            return
        context = torch.autocast("cpu", dtype=self._half)
        with context:
            yield
            # Its cache of cast weights, a hash map by address, is given up as the last context ends.
            with self._tracker.deaths_in_order():
                torch.clear_autocast_cache()

    def _plain_micro_batch(self, ids: torch.Tensor) -> None:
        self._tracker.begin("forward")
        with self._autocast():
            outputs = self._model(input_ids=ids, labels=ids)
            loss = outputs.loss / self._setup.accumulation if self._setup.accumulation > 1 else outputs.loss
        self._backward(loss)
        del outputs, loss
        self._name_gradients()

    def _trainer_micro_batch(self, ids: torch.Tensor) -> None:
        self._tracker.begin("forward")
        loss = self._trainer_loss(ids)
        self._backward(loss)
        del loss
        self._name_gradients()

    def _backward(self, loss: torch.Tensor) -> None:
        self._tracker.begin("backward")
        with gradients_at_the_end(self._trained) if self._setup.compile else contextlib.nullcontext():
            run_backward(loss)
        self._tracker.leave_layers()

    def _trainer_loss(self, ids: torch.Tensor) -> torch.Tensor:
        """``Trainer.compute_loss``: the model as accelerate wraps it, which makes an fp32 copy of its outputs."""
        loss: torch.Tensor = self._outputs(ids)["loss"]
        return loss / self._setup.accumulation if self._setup.accumulation > 1 else loss

    def _outputs(self, ids: torch.Tensor) -> Any:
        with self._autocast():
            outputs = self._model(input_ids=ids, labels=ids)
        if self._half is not None and self._setup.framework == "hf-trainer":
            from accelerate.utils.operations import convert_to_fp32

            outputs = convert_to_fp32(outputs)
        return outputs

    def _name_gradients(self) -> None:
        for parameter in self._trained:
            if parameter.grad is not None:
                self._tracker.recategorize(parameter.grad, "gradients", self._tracker.holder(parameter))

    def _step(self) -> None:
        fresh = self._optimizer is None
        if self._optimizer is None:
            self._optimizer = build_optimizer(self._setup, self._trained, self._model, cuda=self._cuda)
        if self._setup.framework in ("hf-trainer", "torchtitan"):
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0, foreach=True)
        self._update(self._optimizer, fresh=fresh)
        self._optimizer.zero_grad(set_to_none=self._setup.zero_grad != "zero")

    def _update(self, optimizer: torch.optim.Optimizer, *, fresh: bool) -> None:
        # Only the fused optimizer keeps its step counters on the device.
        self._tracker.host_scalars = self._setup.optimizer != "adamw-fused"
        optimizer.step()
        self._tracker.host_scalars = False
        if fresh:
            for parameter, state in optimizer.state.items():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        self._tracker.recategorize(value, "optimizer", self._tracker.holder(parameter))

    def _step_in_backward(self, parameter: torch.nn.Parameter) -> None:
        """One optimizer for each parameter, as torchtune has it: it steps as soon as the gradient is there, which is then
        dropped. Nothing clips."""
        optimizer = build_optimizer(self._setup, [parameter], self._model, cuda=self._cuda)

        def step(owner: torch.Tensor) -> None:
            if owner.grad is not None:
                self._tracker.recategorize(owner.grad, "gradients", self._tracker.holder(owner))
            self._update(optimizer, fresh=not optimizer.state)
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)


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


def _load(model: torch.nn.Module, tracker: Tracker) -> None:
    """Parameters and buffers in the order of ``Module.to``: a module's children before its own."""
    seen: set[int] = set()
    layer_of = {id(module): index for index, layer in enumerate(decoder_layers(model)) for module in layer.modules()}

    def visit(module: torch.nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                tracker.adopt(tensor, category="parameters", layer=layer_of.get(id(module)), holder=name)

    visit(model, "")
