"""A sharded model's checkpoint: weights as transformers reads them, optimizer states as each rank has them. Loads torch on import.

Every rank must call these, in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from estimator.building.loading import inner, read_weights
from estimator.setup import Setup

_DIRECTORY = "optimizer"


def is_sharded(setup: Setup) -> bool:
    """Whether no rank holds all of the parameters."""
    return setup.sharding == "fsdp" or setup.tensor_parallel > 1


def save_optimizer(model: Any, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Each rank writes its part, under ``directory``/optimizer."""
    state_dict_saver.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=directory / _DIRECTORY)


def load_optimizer(model: Any, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """What ``save_optimizer`` wrote, into ``optimizer``."""
    state = get_optimizer_state_dict(model, optimizer)
    state_dict_loader.load(state, checkpoint_id=directory / _DIRECTORY)
    set_optimizer_state_dict(model, optimizer, state)


def load_model(model: Any, directory: Path) -> None:
    """The weights, or adapters, of a checkpoint, into ``model``."""
    if model is inner(model):
        read_weights(model, directory)
        return
    from peft import load_peft_weights
    from torch.distributed.tensor import distribute_tensor

    held = load_peft_weights(str(directory), device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                whole = held[name.replace(".default", "")].to(
                    parameter.device, parameter.dtype
                )  # files name no adapter
                parameter.copy_(
                    distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
                )
