"""Weights into a model that is sharded over ranks, none of which holds it whole, and out of it again. Loads torch on import.

The model is built on the meta device, sharded there, and only then given memory: each rank reads its own part of safetensors
files. Where parameters have other names or shapes than in the files (stacked experts, adapters other than LoRA's), and where
weights are drawn, the first rank builds the whole model in host memory and sends it round, a parameter at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from estimator.building.model import build_model, is_pretrained, model_config
from estimator.setup import Setup

_FILE_BYTES = 5 * 10**9
"""The most in one file, as transformers has it by default."""
_INDEX = "model.safetensors.index.json"


def fill(model: Any, setup: Setup, *, seed: int, device: torch.device, is_main: bool) -> None:
    """Gives ``model``, sharded on the meta device, its memory and weights. ``setup`` is of one device, with the same model."""
    model.to_empty(device=device)
    buffers = dict(_buffers(setup))
    for name, buffer in inner(model).named_buffers():
        buffer.copy_(buffers[name.replace(".base_layer.", ".")])
    directory = _weights_directory(setup.model)
    if directory is not None and _reads_directly(model, directory):
        read_weights(model, directory)
        draw_adapters(model, seed=seed)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    whole = build_model(setup, seed=seed).state_dict() if is_main else {}
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def inner(model: Any) -> Any:
    """The transformers model within peft's, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _buffers(setup: Setup) -> Iterator[tuple[str, torch.Tensor]]:
    """What is computed as the model is made (rotary tables), for real, beside parameters without memory."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(model_config(setup), trust_remote_code=False)
    yield from model.named_buffers()


def _weights_directory(model: str) -> Path | None:
    """Where the safetensors files of ``model`` are; ``None`` for one whose weights are drawn."""
    if not is_pretrained(model) or Path(model).is_file():
        return None
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))


def _named(model: Any) -> dict[str, Any]:
    """Parameters, each once, and what else is saved, by the names that they have in files of the bare model; not adapters."""
    base = inner(model)
    kept = set(base.state_dict())
    tensors = [*base.named_parameters(), *((name, buffer) for name, buffer in base.named_buffers() if name in kept)]
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors if ".lora_" not in name}


def _reads_directly(model: Any, directory: Path) -> bool:
    """Whether every tensor of ``model`` is in the files under its own name, and adapters are LoRA's."""
    adapters = [name for name, _ in model.named_parameters() if ".lora_" in name]
    if any(".lora_A." not in name and ".lora_B." not in name for name in adapters):
        return False
    from safetensors import safe_open

    found: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update(opened.keys())
    return set(_named(model)) <= found


def read_weights(model: Any, directory: Path) -> None:
    """This rank's part of the safetensors files in ``directory``, converted to the parameters' types."""
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    state = {name: tensor.detach() for name, tensor in _named(model).items()}
    state_dict_loader.load(state, storage_reader=HuggingFaceStorageReader(str(directory)))


def draw_adapters(model: Any, *, seed: int) -> None:
    """peft's initial LoRA matrices, the same on every rank: the first uniform, the second zero."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" not in name:
                continue
            whole = torch.zeros(parameter.shape, dtype=parameter.dtype)
            if ".lora_A." in name:
                torch.nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            if isinstance(parameter, DTensor):
                own = whole.to(parameter.device)
                parameter.copy_(distribute_tensor(own, parameter.device_mesh, parameter.placements, src_data_rank=None))
            else:
                parameter.copy_(whole)


def write_weights(model: Any, directory: Path, *, is_main: bool, published: bool) -> None:
    """Weights (or adapters) and configuration as ``from_pretrained`` reads them, written by the first rank.

    Every rank must call it. published: under the names of the hub, where transformers computes with others (stacked
    experts); then the first rank takes the whole model into host memory, else no more of it than one file has.
    """
    if is_main:
        directory.mkdir(parents=True, exist_ok=True)
    if model is not inner(model):
        adapters = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
        whole = {name: _whole(value, is_main=is_main) for name, value in adapters.items()}
        if is_main:
            model.save_pretrained(directory, state_dict=whole)
        return
    if published and _is_renamed(model):
        whole = {name: _whole(value, is_main=is_main) for name, value in model.state_dict().items()}
        if is_main:
            model.save_pretrained(directory, state_dict=whole)
        return
    _write_files(_named(model), directory, is_main=is_main)
    if is_main:
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)


def _is_renamed(model: Any) -> bool:
    """Whether transformers has other names in files than in memory."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def _whole(tensor: Any, *, is_main: bool) -> torch.Tensor:
    """The tensor of all ranks, in the first one's host memory; nothing on the others."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().contiguous() if is_main else torch.empty(0)


def _write_files(named: dict[str, Any], directory: Path, *, is_main: bool) -> None:
    from safetensors.torch import save_file

    files = list(_split(named, lambda tensor: tensor.numel() * tensor.element_size()))
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    names = ["model.safetensors"] if len(files) == 1 else names
    for file, held in zip(names, files, strict=True):
        whole = {name: _whole(named[name], is_main=is_main) for name in held}
        if is_main:
            save_file(whole, directory / file, metadata={"format": "pt"})
        del whole
    if is_main and len(files) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
        place = {name: file for file, held in zip(names, files, strict=True) for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": place}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(named: dict[str, Any], size: Callable[[Any], int]) -> Iterator[list[str]]:
    """Names in their order, as many at a time as a file takes."""
    held: list[str] = []
    bytes_held = 0
    for name, tensor in named.items():
        if held and bytes_held + size(tensor) > _FILE_BYTES:
            yield held
            held, bytes_held = [], 0
        held.append(name)
        bytes_held += size(tensor)
    yield held
