"""transformers' Trainer as a setup configures it, and the same Trainer saying which phase of the step begins.

Loads torch and transformers on import; import it where training happens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from estimator.errors import InputError, MissingError
from estimator.setup import Setup

PHASES = ("forward", "backward", "optimizer", "evaluation", "between")

_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw-fused": "adamw_torch_fused",
    "adamw-8bit": "adamw_bnb_8bit",
    "adamw-paged": "paged_adamw_32bit",
    "adamw-8bit-paged": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}


def training_arguments(setup: Setup, *, output_dir: Path, **overrides: Any) -> TrainingArguments:
    """Trainer's arguments for one device's share of ``setup``; ``overrides`` are TrainingArguments fields and win.

    Nothing is logged, evaluated, saved or reported unless an override asks for it. Checkpointing and the attention
    implementation are the model's own (``estimator.building.model.build_model``). Raises InputError for what Trainer cannot do
    here, and MissingError for an optimizer whose package is not installed.
    """
    setup = setup.resolved()
    assert setup.optimizer is not None
    cuda = torch.cuda.is_available()
    autocast = _autocast(setup)
    check_trainer(setup, cuda=cuda)
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": setup.batch,
        "per_device_eval_batch_size": setup.eval_batch or setup.batch,
        "gradient_accumulation_steps": setup.accumulation,
        "optim": _OPTIMIZERS[setup.optimizer],
        "bf16": autocast == "bf16",
        "fp16": autocast == "fp16",
        "torch_compile": setup.compile,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "seed": 0,
        "data_seed": 0,
    }
    built = TrainingArguments(output_dir=str(output_dir), **(arguments | overrides))
    # Trainer lets ACCELERATE_MIXED_PRECISION decide where neither is asked for; a setup means what it says.
    built.mixed_precision = autocast or "no"
    if built.fsdp and not cuda:
        _let_accelerate_shard()
    return built


def _let_accelerate_shard() -> None:
    """accelerate looks for FSDP on accelerators alone, for no reason that a step has: its processes pass for those of GPUs."""
    from accelerate import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def ranks_arguments(setup: Setup) -> dict[str, Any]:
    """What Trainer is told of the other ranks; nothing for one device."""
    if setup.sharding == "ddp":
        return {"ddp_find_unused_parameters": False}
    if setup.sharding == "fsdp":
        # The model comes sharded (``harness.ranks_model``).
        return {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "NO_WRAP"}}
    return {}


def _autocast(setup: Setup) -> str | None:
    """What autocast computes in, or ``None`` without autocast."""
    return setup.autocast or {"bf16-mixed": "bf16", "fp16-mixed": "fp16"}.get(setup.precision)


def check_trainer(setup: Setup, *, cuda: bool) -> None:
    """Raises InputError for what Trainer cannot do here, MissingError for an optimizer's package; ``setup`` resolved."""
    autocast = _autocast(setup)
    if setup.framework != "hf-trainer":
        raise InputError(
            f"framework: {setup.framework} can be estimated but not run here; write --framework hf-trainer"
        )
    if setup.zero_grad == "zero":
        raise InputError("zero_grad: transformers' Trainer drops gradients between steps; write --zero-grad none")
    if autocast == "fp16" and not cuda:
        raise InputError(
            "precision: fp16 autocast scales its loss on a GPU and there is none; write --precision bf16-mixed or fp32"
        )
    if setup.optimizer in ("adamw-8bit", "adamw-paged", "adamw-8bit-paged"):
        import importlib.util

        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingError(
                f"optimizer: {setup.optimizer} needs bitsandbytes; pip install bitsandbytes, or write --optimizer adamw"
            )


class PhaseTrainer(Trainer):
    """Trainer that says as each phase of a step begins, and that prints nothing.

    ``on_phase`` is called with ``forward``, ``backward``, ``optimizer`` (from clipping to the zeroing of gradients, once a
    step), ``evaluation``, and ``between`` (after a step or an evaluation: logging, saving, the next batch). With
    accumulation, forward and backward repeat for each micro-batch. It creates no tensor and keeps none alive, so that
    what is measured is Trainer's own step. Other keywords are
    Trainer's.
    """

    def __init__(
        self,
        *,
        on_phase: Callable[[str], None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        self._on_phase = on_phase
        self._in_training_step = False
        logging.disable_progress_bar()  # of its own, for every checkpoint's files
        # First in line, so that what other callbacks do at the end of a step is no longer the optimizer's phase.
        super().__init__(callbacks=[_StepEnd(self._enter), *(callbacks or [])], **kwargs)
        self.remove_callback(PrinterCallback)

    def _enter(self, phase: str) -> None:
        if self._on_phase is not None:
            self._on_phase(phase)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._enter("forward")
        self._in_training_step = True
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            self._in_training_step = False
        # Trainer sets this before the micro-batch; clipping, the optimizer's step and zeroing follow at once.
        if self.accelerator.sync_gradients:
            self._enter("optimizer")
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self._in_training_step:
            self._enter("backward")  # the model's outputs are gone by now, as they are in Trainer
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._enter("evaluation")
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._enter("between")


class _StepEnd(TrainerCallback):
    def __init__(self, enter: Callable[[str], None]) -> None:
        self._enter = enter

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._enter("between")
