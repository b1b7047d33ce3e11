"""What a framework's own code does where a setup does not say: read off the frameworks, a row each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from estimator.setup import Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """The defaults are those of transformers and peft."""

    fp32_adapters: bool = True
    """Adapters are fp32 beside a half base (peft); otherwise they have the base's width."""
    dropped_inputs: bool = False
    """Adapters read a dropped-out copy of their input, in the compute type, and keep it with its mask."""
    fused_projections: bool = False
    """One projection makes queries, keys and values, and has one adapter."""
    repeats_kv: bool = False
    """Keys and values are copied out to every query head before attention."""
    keeps_frozen_inputs: bool = False
    """Fused projections keep the whole of their output, and frozen ones the feed-forward's last input."""
    keeps_quantized_inputs: bool = False
    """A product with a 4-bit matrix keeps its input (bitsandbytes before 0.44)."""
    stable_embedding: bool = False
    """Beside 4-bit matrices stands bitsandbytes' embedding, with a gradient, and the one it replaced is not freed."""
    upcasts_logits: bool = True
    """Half logits are copied to fp32 for the loss."""
    separate_losses: bool = False
    """A chunked loss works on logits in the compute type, piece by piece."""
    parallel_loss: bool = False
    """Tensor-parallel logits stay split, through a loss written in plain operators."""
    holds_logits: bool = False
    """The caller keeps the half logits while the loss is computed and differentiated."""
    drops_logits: bool = False
    """The caller drops the half logits between loss and backward."""
    written_out_gelu: bool = True
    """The tanh form of GELU is made of single operators (where the model's family has it)."""
    fused_layers: bool = False
    """Kernels keep of a norm its input and output alone, and between a feed-forward's products what these read and wrote."""
    fused_optimizer: bool = False
    """`adamw` updates without temporaries."""
    unties_head: bool = False
    """A table that the model ties to its head is loaded twice."""
    loads_unsharded: bool = False
    """Under FSDP the whole model is on every device once, when the checkpoint is loaded."""
    flat_parameters: bool = False
    """Its FSDP is FSDP1 whatever the setup says."""
    mixed_units: bool = False
    """FSDP1's flat parameters hold frozen weights and adapters together, so both have gradients (``use_orig_params``)."""
    reduces_last: bool = False
    """Under FSDP only the last micro-batch's gradients are reduced: until then the whole model's are on every rank."""
    expandable_segments: bool = False
    """The launcher asks the allocator for expandable segments."""
    half_with_master_weights: bool = False
    """-mixed is half weights, fp32 gradients, and fp32 master weights and moments split over the data-parallel ranks."""


_BY_FRAMEWORK = {
    # accelerate's ``accumulate`` is ``no_sync`` but for the last micro-batch.
    "hf-trainer": Conventions(reduces_last=True),
    "torch-loop": Conventions(holds_logits=True),
    # litgpt/lora.py, model.py, utils.py (0.2 and 0.5): bf16-true covers the adapters; chunks of 128 tokens. Lightning's
    # FSDPStrategy takes ``use_orig_params``, and finetune/*.py ``no_backward_sync``.
    "litgpt": Conventions(
        fp32_adapters=False, dropped_inputs=True, fused_projections=True, repeats_kv=True, keeps_frozen_inputs=True,
        keeps_quantized_inputs=True, stable_embedding=True, unties_head=True, loads_unsharded=True, upcasts_logits=False,
        separate_losses=True, written_out_gelu=False, flat_parameters=True, mixed_units=True, reduces_last=True,
    ),
    "torchtune": Conventions(fp32_adapters=False),
    # torchtitan/train.py drops `pred` before backward; components/optimizer.py; DTensor's loss_parallel.
    "torchtitan": Conventions(  # run_train.sh sets the allocator
        drops_logits=True, fused_optimizer=True, parallel_loss=True, expandable_segments=True
    ),
    # llmfoundry/models/mpt: flash-attn's cross entropy; torch's own GELU. Composer wraps in FSDP1.
    "llm-foundry": Conventions(upcasts_logits=False, written_out_gelu=False, flat_parameters=True),
    "fms-fsdp": Conventions(flat_parameters=True),
    # Megatron-LM: distributed optimizer, Transformer Engine's layers.
    "megatron": Conventions(
        fp32_adapters=False, fused_layers=True, fused_optimizer=True, half_with_master_weights=True, written_out_gelu=False
    ),
}  # fmt: skip
_BY_FRAMEWORK["megatron-deepspeed"] = _BY_FRAMEWORK["megatron"]
_TRANSFORMERS = Conventions()


@functools.cache
def _of(framework: str, sharding: str | None) -> Conventions:
    if framework == "nemo":  # with FSDP it is NeMo Automodel: transformers' models
        return _TRANSFORMERS if sharding == "fsdp" else _BY_FRAMEWORK["megatron"]
    return _BY_FRAMEWORK.get(framework, _TRANSFORMERS)


def conventions(setup: Setup) -> Conventions:
    """Of the setup's framework."""
    return _of(setup.framework, setup.sharding)


def shards_flat(setup: Setup) -> bool:
    """Whether the setup's sharding is FSDP1."""
    return setup.sharding == "fsdp" and (setup.flat_parameters or conventions(setup).flat_parameters)
