"""Counts a step on fake tensors operator by operator: FLOPs of products, bytes of the rest, kernels. Loads torch on import.

A mode below the tracker, which knows the phase, the layer and what each storage is for. FLOPs are those of torch's own
counter (``torch.utils.flop_counter``); bytes are what an operator's kernel reads and writes when it runs by itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from estimator.dryrun.cut import Cut
from estimator.dryrun.private_api import TorchDispatchMode, executing_node, next_sequence_number
from estimator.dryrun.tracker import Tracker
from estimator.dryrun.work import KINDS, OperatorWork
from estimator.speed.compute import narrowness

_aten = torch.ops.aten
_BATCHED = frozenset({_aten.bmm, _aten.baddbmm})
_FUSED_BACKWARD = 2.5
"""Backward of a fused attention kernel, as a multiple of its forward: four products, and the scores once more."""
_ATTENTION = {
    getattr(_aten, f"_scaled_dot_product_{kernel}"): _FUSED_BACKWARD if kernel.endswith("backward") else 1.0
    for form in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    for kernel in (form, f"{form}_backward")
}
_CONVOLUTIONS = frozenset({_aten.convolution, _aten.convolution_backward})
"""Of language models they are short and in each channel: memory bounds them."""
_FILLS = frozenset({_aten.zeros, _aten.ones, _aten.full, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_zeros, _aten.zero_, _aten.fill_, _aten.arange})  # fmt: skip
_GATHERS = frozenset({_aten.embedding, _aten.index, _aten.gather, _aten.index_select})
"""They read as much as they put out."""
_NOTHING = frozenset({_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided, _aten.detach, _aten.lift_fresh, _aten._local_scalar_dense, _aten.alias, _aten.is_same_size, _aten.set_})  # fmt: skip
_WEIGHTS = ("parameters", "temporaries")
"""What a weight is as an operand of the forward pass: itself, or autocast's copy."""

_Moved = list[tuple[torch.Tensor, float]]


class OperatorCounter(TorchDispatchMode):
    """Counts the last step that runs below ``tracker``, without its optimizer.

    vocab: the width that marks the head's products and the logits. seq: that of the rows and columns of scores.
    """

    def __init__(self, tracker: Tracker, *, vocab: int, seq: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracker, self._vocab, self._seq = tracker, vocab, seq
        self._tally: dict[tuple[str, int | None], float] = defaultdict(float)
        self._kinds: dict[int, str] = {}
        """What the batched products of autograd's nodes are, by the nodes' numbers."""
        self._step = 0

    def work(self, cut: Cut) -> OperatorWork:
        """Of a step of all layers: those that were run count as often as they stand for others."""
        found, repeats = dict.fromkeys(KINDS, 0.0), cut.repeats
        for (kind, layer), amount in self._tally.items():
            found[kind] += amount * (1 if layer is None else repeats[layer])
        return OperatorWork(**found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self._tracker.position.phase in ("forward", "backward") and func.overloadpacket not in _NOTHING:
            step = self._tracker.stream.phases.count("between")
            if step != self._step:
                self._tally.clear()
                self._step = step
            outputs = list(_tensors(found if isinstance(found, (list, tuple)) else (found,)))
            if not _is_view(func, args, outputs):
                self._count(func, args, kwargs or {}, found, _traffic(func, args, outputs))
        return found

    def _count(self, func: Any, args: Any, kwargs: Any, found: Any, moved: _Moved) -> None:
        packet, total = func.overloadpacket, sum(size for _, size in moved)
        self._add("launches", 1.0)
        if packet in _ATTENTION:
            self._attention(packet, args, kwargs)
        elif "grouped_mm" in func.name():  # torch's, and what transformers puts in its place where types are others
            self._product("expert_flops", _grouped_flops(func, args), total)
        elif packet in flop_registry and packet not in _CONVOLUTIONS:
            kind = self._batched(args) if packet in _BATCHED else self._plain(args)
            self._product(kind, float(flop_registry[packet](*args, **kwargs, out_val=found)), total)
        else:
            self._add(self._traffic_kind(moved), total)

    # --- products -----------------------------------------------------------------------------------------------------

    def _product(self, kind: str, flops: float, moved: float) -> None:
        self._add(kind, flops)
        if kind == "expert_flops":
            self._add("matmul_flops", flops)
        if kind == "attention_flops":
            self._add("kernel_attention_flops", flops)
        self._add("scores_bytes" if kind == "attention_flops" else "operand_bytes", moved)
        if self._recomputes():
            self._add("repeated_flops", flops)

    def _plain(self, args: Any) -> str:
        """A weight's product or its gradient's: PyTorch folds batch and sequence into one dimension."""
        wide = any(self._vocab in tensor.shape for tensor in _tensors(args))
        return "head_flops" if wide and self._tracker.position.layer is None else "matmul_flops"

    def _batched(self, args: Any) -> str:
        """Batched products are attention's or a recurrence's, unless one operand is a weight: those are of experts."""
        node = executing_node()
        if node is not None and not torch.is_grad_enabled():
            return self._kinds.get(node[0], "attention_flops")
        weight = any(self._tracker.category(tensor) in _WEIGHTS for tensor in _tensors(args))
        kind = "expert_flops" if weight else "attention_flops"
        # What runs without a node of its own has the number of another, which knows better.
        self._kinds.setdefault(next_sequence_number() - 1, kind)
        return kind

    def _attention(self, packet: Any, args: Any, kwargs: Any) -> None:
        passes = _ATTENTION[packet]
        query, key, value = args[:3] if passes == 1 else args[1:4]
        once = 2.0 * math.prod(query.shape[:3]) * key.shape[2] * (query.shape[3] + value.shape[3])
        causal = any(argument is True for argument in [*args[3:], *kwargs.values()])
        self._add("attention_flops", once * passes)
        narrow = narrowness(query.shape[3], value.shape[3])
        self._add("kernel_attention_flops", once * passes * narrow / (2 if causal else 1))
        self._add("repeated_flops", once if self._recomputes() else once * (passes - 2) if passes > 1 else 0.0)

    def _recomputes(self) -> bool:
        return self._tracker.position.phase == "backward" and torch.is_grad_enabled()

    # --- traffic ------------------------------------------------------------------------------------------------------

    def _traffic_kind(self, moved: _Moved) -> str:
        if any(tensor.dim() > 2 and tensor.shape[-2:] == (self._seq, self._seq) for tensor, _ in moved):
            return "scores_bytes"
        outside = self._tracker.position.layer is None
        if outside and any(tensor.dim() > 1 and tensor.shape[-1] == self._vocab for tensor, _ in moved):
            return "logits_bytes"
        return "elementwise_bytes"

    def _add(self, kind: str, amount: float) -> None:
        self._tally[kind, self._tracker.position.layer] += amount


def _grouped_flops(func: Any, args: Any) -> float:
    """Of [rows, k] by [groups, k, n]; for the weights' gradients [k, rows] by [rows, n]; transformers' backward does both."""
    return 2.0 * float(args[0].numel() * args[1].shape[-1]) * (2 if func.name().endswith("backward") else 1)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _is_view(func: Any, args: Any, outputs: list[torch.Tensor]) -> bool:
    """Nothing is computed: what comes out lies in an input's storage, and no input is written to."""
    if func._schema.is_mutable:
        return False
    inputs = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
    return bool(inputs) and all(tensor.untyped_storage()._cdata in inputs for tensor in outputs)


def _traffic(func: Any, args: Any, outputs: list[torch.Tensor]) -> _Moved:
    """Tensors read and written, each with its bytes."""
    packet = func.overloadpacket
    written = [(tensor, _bytes(tensor)) for tensor in outputs or list(_tensors(args[:1]))]
    if packet in _FILLS:
        return written
    if packet in _GATHERS:
        return written * 2
    inputs = list(_tensors(args))
    if packet in (_aten.copy_, _aten.index_put_):  # what was there is not read
        inputs = inputs[1:]
    return [*written, *((tensor, _bytes(tensor)) for tensor in inputs)]


def _bytes(tensor: torch.Tensor) -> float:
    """Of what it shows of its storage, each once."""
    return float(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))
