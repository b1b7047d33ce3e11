"""The step of ``--framework torch-loop``: the plain loop that the finest published measurements ran.

Forward, backward, the optimizer's step; gradients dropped or zeroed as the setup says; logits gone before the
optimizer's step; no clipping, no schedule. Loads torch on import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from estimator.errors import InputError
from estimator.setup import Setup

LEARNING_RATE = 5e-5


def check_loop(setup: Setup) -> None:
    """Raises InputError for what this loop does not run; ``setup`` resolved."""
    if setup.optimizer not in ("adamw", "adamw-fused", "adafactor", "sgd"):
        raise InputError(
            f"optimizer: --framework torch-loop does not run {setup.optimizer}; write adamw, adamw-fused, adafactor or sgd"
        )
    if _autocast_name(setup) == "fp16":
        raise InputError("precision: --framework torch-loop does not scale losses for fp16; write bf16-mixed")


def autocast_dtype(setup: Setup) -> torch.dtype | None:
    """What autocast computes in, or ``None`` without autocast."""
    return torch.bfloat16 if _autocast_name(setup) == "bf16" else None


def _autocast_name(setup: Setup) -> str | None:
    return setup.autocast or {"bf16-mixed": "bf16", "fp16-mixed": "fp16"}.get(setup.precision)


def build_optimizer(model: torch.nn.Module, setup: Setup) -> torch.optim.Optimizer:
    """The setup's optimizer over what trains, with torch's defaults but for the learning rate."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if setup.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=LEARNING_RATE)
    if setup.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=LEARNING_RATE, foreach=True)
    fused = setup.optimizer == "adamw-fused"
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=fused, foreach=not fused)


class TorchLoop:
    """The loop over one model and one set of sequences; ``setup`` resolved. Raises InputError as ``check_loop``."""

    def __init__(
        self, setup: Setup, model: torch.nn.Module, train: Dataset[Any], *, on_phase: Callable[[str], None]
    ) -> None:
        check_loop(setup)
        self._setup = setup
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self._device)
        if setup.compile:
            self.model = cast("torch.nn.Module", torch.compile(self.model))
        self.optimizer = build_optimizer(self.model, setup)
        self._batches = DataLoader(train, batch_size=setup.batch, shuffle=False)
        self._on_phase = on_phase
        self._autocast = autocast_dtype(setup)

    def train(self, steps: int) -> None:
        """Runs ``steps`` optimizer steps; ``between`` is entered as each ends."""
        self.model.train()
        batches = iter(self._batches)
        for _ in range(steps):
            for _ in range(self._setup.accumulation):
                self._micro_batch(batches)
            self._on_phase("optimizer")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=self._setup.zero_grad == "none")
            self._on_phase("between")

    def _micro_batch(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        batch = {name: tensor.to(self._device) for name, tensor in next(batches).items()}
        self._on_phase("forward")
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._autocast is not None:
            autocast = torch.autocast(self._device, dtype=self._autocast)
        with autocast:
            outputs = self.model(**batch)
            loss = outputs.loss / self._setup.accumulation
        # As published: the caller holds the outputs, logits and all, until the backward pass has ended.
        self._on_phase("backward")
        loss.backward()

    def save(self, directory: Path) -> None:
        """A checkpoint: the model in safetensors, the optimizer and the random state through ``torch.save``."""
        directory.mkdir(parents=True, exist_ok=True)
        model: Any = getattr(self.model, "_orig_mod", self.model)  # torch.compile wraps it
        model.save_pretrained(directory)
        torch.save(self.optimizer.state_dict(), directory / "optimizer.pt")
        torch.save({"cpu": torch.random.get_rng_state()}, directory / "rng_state.pth")
