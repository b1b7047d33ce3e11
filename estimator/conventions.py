"""What a framework's own code does where a setup does not say: read off the frameworks, a row each."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

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
    writes_out_caps: bool = False
    """Attention with capped scores is made of single operators whatever the setup says."""
    repeats_kv: bool = False
    """Keys and values are copied out to every query head before attention."""
    keeps_frozen_inputs: bool = False
    """Fused projections keep the whole of their output, and frozen ones the feed-forward's last input."""
    keeps_quantized_inputs: bool = False
    """A product with a 4-bit matrix keeps its input on its context (bitsandbytes before 0.44), so for as long as somebody holds
    the loss: the caller does through the next forward pass."""
    quantizes_head: bool = False
    """The head is a 4-bit matrix as any, quantized from fp16: a product makes it whole in fp16, and then in the compute type."""
    upcasts_logits: bool = True
    """Half logits are copied to fp32 for the loss."""
    separate_losses: bool = False
    """A chunked loss works piece by piece on logits that the wrapped model returns in fp32."""
    frees_chunks: bool = True
    """A chunked loss that is compiled gives a chunk's logits back before it comes to the next one's gradient."""
    parallel_loss: bool = False
    """Tensor-parallel logits stay split, through a loss written in plain operators."""
    whole_stream: bool = False
    """Tensor parallelism splits matrices alone, by transformers' own plan: what is between them, norms and logits are whole on
    every rank."""
    holds_logits: bool = False
    """The caller keeps the half logits while the loss is computed and differentiated."""
    drops_logits: bool = False
    """The caller drops the half logits between loss and backward."""
    softmax_in_place: bool = False
    """The loss normalises the logits' fp32 copy in place, and its gradient is in place again."""
    loss_in_place: bool = False
    """Whatever the loss, one kernel writes the half logits' gradients over them."""
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
    half_weights: bool = False
    """-mixed is half weights, gradients and states; what is reduced is fp32."""
    half_with_master_weights: bool = False
    """-mixed is half weights, fp32 gradients, and fp32 master weights and moments split over the data-parallel ranks."""
    distributed_optimizer: bool = False
    """So is ``zero1``; otherwise that is DeepSpeed's engine."""


_BY_FRAMEWORK = {
    # accelerate's ``accumulate`` is ``no_sync`` but for the last micro-batch.
    "hf-trainer": Conventions(reduces_last=True, whole_stream=True),
    "torch-loop": Conventions(holds_logits=True),
    # litgpt/lora.py, model.py, utils.py (0.2 and 0.5): bf16-true covers the adapters; chunks of 128 tokens. Lightning's
    # FSDPStrategy takes ``use_orig_params``, and finetune/*.py ``no_backward_sync``.
    "litgpt": Conventions(
        fp32_adapters=False, dropped_inputs=True, fused_projections=True, writes_out_caps=True, repeats_kv=True, keeps_frozen_inputs=True,
        keeps_quantized_inputs=True, quantizes_head=True, unties_head=True, loads_unsharded=True, upcasts_logits=False,
        separate_losses=True, written_out_gelu=False, flat_parameters=True, mixed_units=True, reduces_last=True,
    ),
    # Its recipes write `fused: True`, but for those that offload 70B and more.
    "torchtune": Conventions(fp32_adapters=False, fused_optimizer=True),
    # torchtitan/train.py drops `pred` before backward; components/optimizer.py; DTensor's loss_parallel.
    "torchtitan": Conventions(  # run_train.sh sets the allocator
        drops_logits=True, fused_optimizer=True, parallel_loss=True, expandable_segments=True, frees_chunks=False
    ),
    # llmfoundry/models/mpt: flash-attn's cross entropy; torch's own GELU. Composer wraps in FSDP1.
    "llm-foundry": Conventions(upcasts_logits=False, written_out_gelu=False, flat_parameters=True),
    "fms-fsdp": Conventions(flat_parameters=True),
    # Megatron-LM: distributed optimizer, Transformer Engine's layers; tensor_parallel/cross_entropy.py.
    "megatron": Conventions(
        fp32_adapters=False, fused_layers=True, fused_optimizer=True, half_with_master_weights=True, written_out_gelu=False,
        distributed_optimizer=True, softmax_in_place=True,
    ),
}  # fmt: skip
_BY_FRAMEWORK["megatron-deepspeed"] = dataclasses.replace(_BY_FRAMEWORK["megatron"], distributed_optimizer=False)
# train_gpt2.cu: half weights, fp32 master weights and moments split over the ranks, fused residual and norm, GELU's input
# and output kept (-r 0). Its gradients are half, 2 B a parameter less than Megatron's.
_BY_FRAMEWORK["llm.c"] = dataclasses.replace(_BY_FRAMEWORK["megatron-deepspeed"], loss_in_place=True)
_TRANSFORMERS = Conventions()
# NeMo with FSDP: transformers' models, loaded in bf16 (_transformers/auto_model.py), adapters alike (components/_peft).
_AUTOMODEL = Conventions(fp32_adapters=False, half_weights=True)


@functools.cache
def _of(framework: str, sharding: str | None) -> Conventions:
    if framework == "nemo":
        return _AUTOMODEL if sharding == "fsdp" else _BY_FRAMEWORK["megatron"]
    return _BY_FRAMEWORK.get(framework, _TRANSFORMERS)


def conventions(setup: Setup) -> Conventions:
    """Of the setup's framework."""
    return _of(setup.framework, setup.sharding)


def splits_by_own_plan(setup: Setup) -> bool:
    """Whether the model is split by transformers' own plan, as it is loaded; FSDP around it is transformers' too."""
    return setup.tensor_parallel > 1 and conventions(setup).whole_stream


def stream_ranks(setup: Setup) -> Any:
    """How many tensor-parallel ranks share what is between the matrices: by sequence, in Megatron's and torchtitan's plans.
    An array where ``setup`` is a grid."""
    return 1 if conventions(setup).whole_stream else setup.tensor_parallel


def shards_flat(setup: Setup) -> bool:
    """Whether the setup's sharding is FSDP1."""
    return setup.sharding == "fsdp" and (setup.flat_parameters or conventions(setup).flat_parameters)
