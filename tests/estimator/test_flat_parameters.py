"""FSDP1 in closed form: against torch's own, and against published peaks of fine-tunes that it sharded."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from estimator.measured import from_row
from estimator.memory.flat_parameters import keeps_layer_inputs
from estimator.memory.formula import memory_phases, peak_bytes
from estimator.memory.states import placement, states
from estimator.model.catalog import resolve_model
from estimator.model.shape import count_parameters
from estimator.setup import Setup
from estimator.units import GB, GIB

PACKED = {
    "framework": "hf-trainer", "accelerator": "A100-SXM-80GB", "sharding": "fsdp", "precision": "bf16", "autocast": "bf16",
    "optimizer": "adamw", "checkpointing": "full", "attention": "flash", "seq": 4096, "transformers": "4.45.2",
    "run": "r",
}  # fmt: skip
LORA = {"method": "lora", "lora_rank": 16, "lora_targets": "q_proj k_proj v_proj o_proj"}


def _peak_gib(**settings: Any) -> float:
    setup = from_row(PACKED | settings).setup.resolved()
    return float(peak_bytes(resolve_model(setup.model), setup)) / GIB


# foundation-model-stack/fms-acceleration, scripts/benchmarks/refs (max_memory_allocated of HF Trainer's memory tracker).
@pytest.mark.parametrize(
    ("settings", "measured_gib"),
    [
        (LORA | {"model": "llama-3-8b", "accelerators": 2, "loss": "fused-linear", "batch": 4}, 21.78),
        (LORA | {"model": "llama-3-8b", "accelerators": 2, "loss": "fused-linear", "batch": 16}, 57.23),
        (LORA | {"model": "mistral-7b", "accelerators": 4, "loss": "fused-kernel", "batch": 8}, 28.34),
        (
            LORA | {"model": "mixtral-8x7b", "accelerators": 2, "batch": 4, "transformers": "4.48.1", "autocast": None},
            60.40,
        ),
        (
            LORA
            | {"model": "llama-3-8b", "accelerators": 2, "loss": "fused-linear", "batch": 8, "method": "qlora"}
            | {"base_quantization": "nf4-dq"},
            28.31,
        ),
    ],
)
def test_published_adapters_under_fsdp1(settings: dict[str, Any], measured_gib: float) -> None:
    assert _peak_gib(**settings) == pytest.approx(measured_gib, rel=0.035)


# Lightning-AI/litgpt, tutorials/resource-tables.md and config_hub (GB of max_memory_allocated).
@pytest.mark.parametrize(
    ("settings", "measured_gb"),
    [
        ({"model": "llama-2-13b", "accelerators": 4, "method": "lora", "accumulation": 32, "seq": 1304}, 35.57),
        ({"model": "gemma-2b", "accelerators": 4, "method": "full", "accumulation": 4, "seq": 512}, 17.43),
    ],
)
def test_litgpt_keeps_whole_gradients_until_the_last_micro_batch(settings: dict[str, Any], measured_gb: float) -> None:
    lora = {"lora_rank": 8, "lora_targets": "q_proj v_proj"} if settings["method"] == "lora" else {}
    litgpt = {"framework": "litgpt", "loss": "chunked", "batch": 1, "autocast": None, "attention": "sdpa"}
    assert _peak_gib(**(settings | lora | litgpt)) * GIB == pytest.approx(measured_gb * GB, rel=0.04)


def test_only_fsdp1_with_reentrant_checkpointing_keeps_the_inputs() -> None:
    kept = Setup(
        model="llama-3-8b", sharding="fsdp", method="lora", checkpointing="full", checkpoint_reentrant=True,
        flat_parameters=True, accelerators=2,
    )  # fmt: skip
    assert keeps_layer_inputs(kept)
    for name, value in (
        ("flat_parameters", False), ("checkpoint_reentrant", False), ("checkpointing", "none"), ("framework", "litgpt"),
    ):  # fmt: skip
        assert not keeps_layer_inputs(Setup(**(kept.as_dict() | {name: value})))


def test_tables_before_transformers_5_are_read_as_fsdp1() -> None:
    row = {"run": "r", "model": "llama-3-8b", "sharding": "fsdp", "checkpointing": "full", "accelerators": 2}
    old, new = from_row(row | {"transformers": "4.48"}).setup, from_row(row | {"transformers": "5.1"}).setup
    assert (old.flat_parameters, old.checkpoint_reentrant) == (True, True)
    assert (new.flat_parameters, new.checkpoint_reentrant) == (False, False)


def test_torch_keeps_the_inputs_of_frozen_units() -> None:
    """Live tensors of the hidden state's size as the first layer is recomputed, the last of backward."""
    layers = 6
    assert _live_hidden_states(layers, frozen=False) == _live_hidden_states(layers, frozen=False, wrap=False)
    plain, kept = _live_hidden_states(layers, frozen=True, wrap=False), _live_hidden_states(layers, frozen=True)
    # All layers' inputs and all their gradients, where otherwise only those of the layer at work are left.
    assert kept >= 2 * layers > plain


def _live_hidden_states(layers: int, *, frozen: bool, wrap: bool = True) -> int:
    torch = pytest.importorskip("torch")
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
    from torch.utils.checkpoint import checkpoint

    tokens, hidden = 8, 64

    class Layer(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = (
                torch.nn.Linear(a, b, bias=False) for a, b in ((hidden, hidden), (hidden, 2), (2, hidden))
            )
            self.base.requires_grad_(not frozen)

        def forward(self, x: Any) -> Any:
            return x + torch.tanh(self.base(x) + self.up(self.down(x)))

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(layers))

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = checkpoint(layer.__call__, x, use_reentrant=True)
            return x

    def adapter(module: Any) -> bool:  # as peft's fsdp_auto_wrap_policy
        weight = getattr(module, "weight", None)
        return frozen and weight is not None and weight.requires_grad

    model: Any = Model()
    live = _LiveStorages(tokens * hidden * 4)
    counts: list[int] = []
    first = model.layers[0]
    first.register_forward_hook(lambda *_: counts.append(live.count()))
    if wrap:
        stores: Any = dist
        dist.init_process_group("gloo", store=stores.HashStore(), rank=0, world_size=1)
    try:
        if wrap:
            policies = [
                functools.partial(lambda_auto_wrap_policy, lambda_fn=adapter),
                functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Layer}),
            ]
            wraps = functools.partial(_or_policy, policies=policies)
            cpu = torch.device("cpu")
            model = FullyShardedDataParallel(model, auto_wrap_policy=wraps, use_orig_params=False, device_id=cpu)
        with live.mode():
            model(torch.randn(tokens, hidden, requires_grad=True)).sum().backward()
    finally:
        if wrap:
            dist.destroy_process_group()
    return counts[-1]


class _LiveStorages:
    """Counts the storages of one size that operators made and that are still referred to."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen: dict[int, Any] = {}

    def mode(self) -> Any:
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        outer = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                made = func(*args, **(kwargs or {}))
                for tensor in tree_leaves(made):
                    storage = getattr(tensor, "untyped_storage", lambda: None)()
                    if storage is not None and storage.nbytes() == outer._size:
                        outer._seen[storage._cdata] = storage._weak_ref()
                return made

        mode: Any = Mode
        return mode()

    def count(self) -> int:
        import torch

        return sum(torch.UntypedStorage._new_with_weak_ptr(ref) is not None for ref in self._seen.values())


def test_experts_are_not_divided_twice() -> None:
    shape = resolve_model("mixtral-8x7b")
    setup = Setup(
        model="mixtral-8x7b",
        framework="torchtitan",
        sharding="fsdp",
        accelerators=8,
        expert_parallel=8,
        precision="bf16",
    ).resolved()
    assert states(shape, setup).parameters * placement(setup).parameters == pytest.approx(
        2 * count_parameters(shape).total
    )


def test_hybrid_sharding_keeps_what_it_summed_over_the_replicas() -> None:
    """FSDP2's parameter groups hold the input of each all-reduce to the end of backward, where gradients are cast after it."""
    shape = resolve_model("mistral-7b")
    setup = Setup(model="mistral-7b", sharding="fsdp", accelerators=4, shard_size=2, checkpointing="full", seq=512)
    end = [phase.bytes for phase in memory_phases(shape, setup.resolved()) if phase.phase == "backward"][1]
    sharded = Setup(**(setup.as_dict() | {"accelerators": 2})).resolved()
    alone = [phase.bytes for phase in memory_phases(shape, sharded) if phase.phase == "backward"][1]
    assert end - alone == pytest.approx(2 * count_parameters(shape).total / 2, rel=1e-3)
