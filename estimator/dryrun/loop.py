"""The training step that is dry-run, as the plain loop and as transformers' Trainer have it. Loads torch on import."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from estimator.building.model import decoder_layers
from estimator.conventions import splits_by_own_plan
from estimator.dryrun.compiled import gradients_at_the_end
from estimator.dryrun.optimizers import build_optimizer, by_mesh
from estimator.dryrun.private_api import run_backward
from estimator.dryrun.tracker import Tracker
from estimator.setup import Setup


class Loop:
    """One model and its optimizer, stepping. ``setup`` resolved."""

    def __init__(self, setup: Setup, model: Any, tracker: Tracker, *, cuda: bool) -> None:
        self._setup, self._model, self._tracker, self._cuda = setup, model, tracker, cuda
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer: torch.optim.Optimizer | None = None
        self._half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            setup.autocast or {"bf16-mixed": "bf16", "fp16-mixed": "fp16"}.get(setup.precision, "")
            # FSDP's gathered weights are half themselves, where its policy says so.
            if setup.sharding != "fsdp" or setup.base_quantization or splits_by_own_plan(setup)
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
        _load(self._model, self._tracker, shards=not (self._setup.sharding == "fsdp" and self._setup.offload))

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
        self._tracker.position.leave_layers()

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
        # FSDP's shards that are on the host are stepped there.
        on_host = self._setup.sharding == "fsdp" and self._setup.offload
        with self._tracker.blind() if on_host else contextlib.nullcontext():
            self._step_on_device()

    def _step_on_device(self) -> None:
        fresh = self._optimizer is None
        if self._optimizer is None:
            self._optimizer = build_optimizer(self._setup, self._trained, self._model, cuda=self._cuda)
        if self._setup.framework in ("hf-trainer", "torchtitan"):
            self._clip()
        self._update(self._optimizer, fresh=fresh)
        self._optimizer.zero_grad(set_to_none=self._setup.zero_grad != "zero")

    def _clip(self) -> None:
        """Of several meshes each has its own norm (``Trainer._mixed_mesh_grad_norm``)."""
        groups = [group["params"] for group in by_mesh(self._trained)]
        if len(groups) == 1:
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0, foreach=True)
            return
        norms = []
        for parameters in groups:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
            norms.append(getattr(norm, "full_tensor", lambda norm=norm: norm)())
        total = torch.linalg.vector_norm(torch.stack(norms))
        for parameters in groups:
            torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, total, foreach=True)

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


def _load(model: torch.nn.Module, tracker: Tracker, *, shards: bool = True) -> None:
    """Parameters and buffers in the order of ``Module.to``: a module's children before its own. Without ``shards`` sharded
    parameters are on the host."""
    seen: set[int] = set()
    layer_of = {id(module): index for index, layer in enumerate(decoder_layers(model)) for module in layer.modules()}

    def visit(module: torch.nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            on_host = not shards and hasattr(tensor, "_local_tensor")
            if tensor is not None and id(tensor) not in seen and not on_host:
                seen.add(id(tensor))
                tracker.adopt(tensor, category="parameters", layer=layer_of.get(id(module)), holder=name)

    visit(model, "")
