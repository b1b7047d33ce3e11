"""Tensor parallelism through DTensor, as torchtitan plans it for llama. Loads torch on import.

Between the blocks the sequence is split, norms included; queries, keys, values, gate and up are split by columns, what
follows them by rows; embedding and head by the vocabulary, over which the loss stays split. Source: torchtitan,
``models/llama3/infra/parallelize.py``. All this for transformers' models of the same modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from estimator.building.model import decoder_layers


def parallelize(model: Any, mesh: Any, *, tokens: int) -> None:
    """Splits ``model`` (one of transformers' like llama) over the ranks of ``mesh``, which has one dimension.

    tokens: of a whole sequence, which every rank's attention sees.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(use_local_output=True),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, ends)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for layer in decoder_layers(model):
        parallelize_module(layer, mesh, _layer_plan(layer))
    model.model.register_forward_pre_hook(_whole_positions(tokens), with_kwargs=True)


def _layer_plan(layer: torch.nn.Module) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel

    split, whole = Shard(1), Replicate()
    plan: dict[str, Any] = {
        "input_layernorm": SequenceParallel(use_local_output=True),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": split},
            desired_input_kwarg_layouts={"hidden_states": whole},
            use_local_output=True,
        ),
        "self_attn.o_proj": RowwiseParallel(output_layouts=split),
        "post_attention_layernorm": SequenceParallel(use_local_output=True),
        "mlp": PrepareModuleInput(
            input_layouts=(split,), desired_input_layouts=(whole,), use_local_output=True
        ),
        "mlp.down_proj": RowwiseParallel(output_layouts=split),
    }  # fmt: skip
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan |= {name: ColwiseParallel() for name in columns}
    # Norms of each head: over [batch, tokens, heads, width], of which the heads are split.
    names = {name for name, _ in layer.named_modules()}
    heads = ("self_attn.q_norm", "self_attn.k_norm")
    return plan | {name: SequenceParallel(sequence_dim=2, use_local_output=True) for name in heads if name in names}


def _whole_positions(tokens: int) -> Any:
    """The model would count the positions of its own part of the embedded sequence."""

    def hook(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"position_ids": torch.arange(tokens).unsqueeze(0)}

    return hook


@contextlib.contextmanager
def split_loss() -> Iterator[None]:
    """Cross entropy over logits that stay split by the vocabulary, forward and backward."""
    from torch.distributed.tensor.parallel import loss_parallel

    with loss_parallel():
        yield
