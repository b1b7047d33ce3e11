"""What a checkpoint takes on the disk, by kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from estimator.errors import InputError

# As transformers' Trainer, peft and torch.save name them.
_MODEL = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
_OPTIMIZER = ("optimizer*.pt", "optimizer*.bin", "optimizer/*")
"""The last: sharded states, a file from each rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSize:
    """Bytes of the files' content (what a file system adds is not in it)."""

    model_bytes: int
    """Weights, or adapters."""
    optimizer_bytes: int
    other_bytes: int
    """Configuration, the schedule, random states, the trainer's own state, a tokenizer."""

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + self.optimizer_bytes + self.other_bytes


def checkpoint_size(directory: Path) -> CheckpointSize:
    """Of every file under ``directory``. Raises InputError where there is none."""
    if not directory.is_dir():
        raise InputError(f"checkpoint: {directory} is not a directory; name the one that training wrote")
    model = optimizer = other = 0
    for file in directory.rglob("*"):
        if not file.is_file():
            continue
        size = file.stat().st_size
        if any(file.match(pattern) for pattern in _MODEL):
            model += size
        elif any(file.match(pattern) for pattern in _OPTIMIZER):
            optimizer += size
        else:
            other += size
    return CheckpointSize(model_bytes=model, optimizer_bytes=optimizer, other_bytes=other)
