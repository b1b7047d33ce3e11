"""What a process does on a GPU before and around its training, so that a setup is what it says. CUDA must not be initialised yet."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from estimator.model.catalog import resolve_model
from estimator.setup import Setup
from profiler.device import LocalDevice

if TYPE_CHECKING:
    import torch

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The newer name first; where both are set, CUDA's allocator reads the older one."""
_EXPANDABLE = "expandable_segments"


def settle_allocator(setup: Setup) -> None:
    """Gives this process's CUDA allocator ``setup.expandable_segments``; what the environment says otherwise stays."""
    given = next((os.environ[name] for name in reversed(_ALLOCATOR_VARIABLES) if os.environ.get(name)), "")
    settings = allocator_settings(given, expandable=setup.expandable_segments)
    if settings == given:
        return
    for name in _ALLOCATOR_VARIABLES:
        os.environ[name] = settings
    import torch

    # The variables are read when the allocator is first asked for its settings, which importing torch may have done.
    apply: Any = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    apply = apply or getattr(torch._C, "_cuda_cudaCachingAllocator_set_allocator_settings", None)
    if apply is not None:
        apply(settings)


def allocator_settings(given: str, *, expandable: bool) -> str:
    """``given`` (``key:value,...``) with that setting; where it is off and was not given, unchanged."""
    parts = [part.strip() for part in _top_level_parts(given) if part.strip()]
    kept = [part for part in parts if part.partition(":")[0].strip() != _EXPANDABLE]
    if not expandable and len(kept) == len(parts):
        return given
    return ",".join([*kept, f"{_EXPANDABLE}:{expandable}"])


def _top_level_parts(text: str) -> list[str]:
    """Split at the commas that are in no brackets: ``roundup_power2_divisions:[256:1,512:2]`` is one part."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def attention_held_to(kernel: str | None) -> contextlib.AbstractContextManager[Any]:
    """Inside, SDPA runs this kernel or fails; ``None`` leaves PyTorch its choice."""
    if kernel is None:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }[kernel]
    held: contextlib.AbstractContextManager[Any] = sdpa_kernel(backend)
    return held


def chosen_attention(setup: Setup) -> str | None:
    """The kernel that SDPA picks on this device for the setup's heads, without a mask; ``None`` where it is not asked.

    PyTorch's order differs by device and release: cuDNN's comes first on Hopper and Blackwell where cuDNN is new enough.
    """
    if setup.attention != "sdpa":
        return None
    import torch

    shape = resolve_model(setup.model)
    half = setup.autocast or setup.precision.removesuffix("-mixed")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(half, torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def heads(count: int) -> torch.Tensor:
        return torch.zeros(1, count, 64, shape.head_dim, dtype=dtype, device=device, requires_grad=True)

    grouped = shape.kv_heads != shape.heads
    query, key = heads(shape.heads), heads(shape.kv_heads)
    choose: Any = torch._fused_sdp_choice
    return {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}.get(
        int(choose(query, key, key, None, 0.0, True, enable_gqa=grouped))
    )


def draw_weights(model: Any, *, seed: int = 0) -> None:
    """Random weights for a model that ``build_model(..., drawn=False)`` left without, where they lie; adapters have theirs.

    A CPU's generator takes 40 to 50 s for 8B numbers. Nothing is allocated.
    """
    import torch

    torch.manual_seed(seed)
    deviation = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or not parameter.is_floating_point():  # quantized ones were drawn before
                continue
            if parameter.dim() > 1:
                parameter.normal_(0.0, deviation)
            elif not name.endswith("weight"):  # biases, attention sinks
                parameter.zero_()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm) and module.weight is not None:
                module.weight.fill_(1.0)


def device_facts(device: LocalDevice) -> dict[str, Any]:
    """The environment of this process, and on a GPU what CUDA says of it. Call it in a process made for it: raises what
    torch raises where CUDA cannot be used."""
    from profiler.environment import environment_json

    facts: dict[str, Any] = json.loads(environment_json(device))
    return facts | (_probe() if device.kind == "cuda" else {})


def _probe() -> dict[str, Any]:
    """Of device 0: name, memory, and what a bare context takes."""
    import torch

    from profiler.nvml import first_gpu

    gpu = first_gpu()
    used_before = None if gpu is None else gpu.used_bytes()
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    own = None if gpu is None else gpu.process_bytes(os.getpid())
    return {
        "cuda_name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda_total_bytes": total,
        "cuda_free_bytes": free,
        "nvml_total_bytes": None if gpu is None else gpu.capacity_bytes(),
        "nvml_used_before_bytes": used_before,
        "nvml_used_bytes": None if gpu is None else gpu.used_bytes(),
        "nvml_names_processes": own is not None,
        "bare_context_bytes": None if own is None else own - torch.cuda.memory_reserved(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "cudnn": torch.backends.cudnn.version(),
        "arch_list": " ".join(torch.cuda.get_arch_list()),
    }
