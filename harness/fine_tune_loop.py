"""The plain loop as a full fine-tune, on one device or as one rank of several: it clips, schedules, evaluates, saves, resumes.

The step is that of ``--framework torch-loop`` (see ``harness.torch_loop``), with Trainer's defaults for what a whole training
needs beside it: gradients clipped at 1.0, a learning rate that falls linearly to zero. Loads torch on import.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch

from estimator.errors import InputError
from harness.fine_tune_state import FineTuneState
from harness.ranks_model import local_tensors, unwrapped
from harness.step_data import evaluation_indices, stacked, step_indices, targets
from harness.torch_loop import autocast_dtype, build_optimizer
from harness.train_outcome import Run
from harness.world import World, summed

_CLIPPED_AT = 1.0


class FineTuneLoop:
    """One rank's part of a run. ``model`` is from ``build_for_rank``; ``watch`` is told what happens."""

    def __init__(self, run: Run, world: World, model: Any, state: FineTuneState) -> None:
        self._run, self._world, self._state = run, world, state
        self._setup = run.setup
        self.model = model
        self.module = unwrapped(model)
        self._device = torch.device("cuda", world.local_rank) if run.device.kind == "cuda" else torch.device("cpu")
        self._optimizer = build_optimizer(model, run.setup)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._data_rank = world.rank // run.setup.tensor_parallel
        # What FSDP gathers is half itself; there is nothing to cast.
        self._autocast = None if run.setup.sharding == "fsdp" else autocast_dtype(run.setup)

    def held(self) -> torch.nn.Module:
        """What of the model is in this rank's memory."""
        return local_tensors(self.module)

    def train(self, resume: Path | None) -> None:
        """From the checkpoint ``resume``, or the beginning, to the last step."""
        state, steps = self._state, self._run.steps
        torch.manual_seed(self._run.plan.seed + self._data_rank)
        first = state.resume(resume, self.module, self._optimizer) if resume else 0
        with self._split_loss():
            for step in range(first, steps.steps):
                state.begin_step()
                loss, rate = self._step(step)
                state.end_step(step + 1, self._finite("train", loss, step + 1), rate)
                if steps.evaluates_after(step + 1):
                    began = time.perf_counter()
                    loss = self._evaluate()
                    state.evaluated(step + 1, self._finite("eval", loss, step + 1), time.perf_counter() - began)
                if state.saves_after(step + 1):
                    state.save(step + 1, self.module, self._optimizer)
                state.done(step + 1)

    def _step(self, step: int) -> tuple[float, float]:
        """The loss of one optimizer step, over all ranks, and the learning rate that it used."""
        setup, plan, steps = self._setup, self._run.plan, self._run.steps
        rate = plan.learning_rate * (steps.steps - step) / steps.steps
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        shares = step_indices(
            step, seed=plan.seed, samples=steps.samples, batch=setup.batch, accumulation=setup.accumulation,
            ranks=setup.data_ranks, rank=self._data_rank,
        )  # fmt: skip
        self.model.train()
        batches = [stacked(self._run.data.train, share, torch.device("cpu")) for share in shares]
        own = sum(targets(batch) for batch in batches)
        (counted,) = summed(self._world, own, device=self._device) if not setup.pack else [own * self._world.size]
        # Ranks that share a tensor split have read the same; and what is reduced is the mean over the data's ranks.
        weight = setup.data_ranks / (counted / setup.tensor_parallel)
        total = torch.zeros((), device=self._device)
        for number, batch in enumerate(batches):
            with self._unsynchronized(number + 1 < len(batches)):
                total += self._micro_batch(batch, weight * targets(batch))
        self._state.enter("optimizer")
        torch.nn.utils.clip_grad_norm_(self._trained, _CLIPPED_AT, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=setup.zero_grad == "none")
        self._state.enter("between")
        (found,) = summed(self._world, float(total), device=self._device)
        return found / self._world.size, rate

    def _micro_batch(self, batch: dict[str, torch.Tensor], weight: float) -> torch.Tensor:
        """Adds to the gradients; ``weight`` of the mean loss, which is returned with it."""
        batch = {name: tensor.to(self._device) for name, tensor in batch.items()}
        self._state.enter("forward")
        with self._autocast_context():
            outputs = self.model(**batch)
            loss = outputs.loss * weight
        # As in the plain loop: the caller holds the outputs until the backward pass has ended.
        self._state.enter("backward")
        loss.backward()
        return _plain(loss.detach())

    def _evaluate(self) -> float:
        """Mean loss over the held-out tokens."""
        self._state.enter("evaluation")
        setup, data = self._setup, self._run.data.evaluation
        batches = evaluation_indices(
            self._run.evaluated, batch=setup.eval_batch or setup.batch, ranks=setup.data_ranks, rank=self._data_rank
        )
        self.model.eval()
        total, counted = 0.0, 0
        with torch.no_grad():
            for indices in batches:
                # A rank that has nothing left takes part all the same: others need its shard.
                batch = stacked(data, indices or [0], self._device)
                with self._autocast_context():
                    loss = self.module(**batch).loss
                if indices:
                    total, counted = total + float(_plain(loss)) * targets(batch), counted + targets(batch)
        self._state.enter("between")
        whole, tokens = summed(self._world, total, counted, device=self._device)
        return whole / tokens

    def _finite(self, kind: str, loss: float, step: int) -> float:
        if not math.isfinite(loss):
            raise InputError(
                f"learning_rate: the {kind} loss is {loss} after step {step}; write a lower --learning-rate, "
                "or --precision bf16-mixed where it is fp16"
            )
        return loss

    def _autocast_context(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast)

    def _unsynchronized(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """DDP sums gradients once a step; FSDP2 in every micro-batch, so that it never holds them whole."""
        if wanted and self._setup.sharding == "ddp":
            context: contextlib.AbstractContextManager[Any] = self.model.no_sync()
            return context
        return contextlib.nullcontext()

    def _split_loss(self) -> contextlib.AbstractContextManager[Any]:
        if self._setup.tensor_parallel == 1:
            return contextlib.nullcontext()
        from estimator.dryrun.tensor_parallel import split_loss

        return split_loss()


def _plain(loss: Any) -> torch.Tensor:
    """Of a loss that tensor-parallel ranks share."""
    whole: torch.Tensor = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
    return whole
