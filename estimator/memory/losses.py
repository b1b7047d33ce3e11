"""Losses over the vocabulary other than transformers' own, for any causal LM whose head feeds its loss. Loads torch on import.

Each does what the package that it is named after does, in plain torch, and allocates what that does: ``chunked`` is torchtune's
``CEWithChunkedOutputLoss``, ``fused-linear`` and ``fused-kernel`` are Liger's (0.8.5), ``cut-cross-entropy`` is Apple's. A
dry run of a GPU takes the Triton kernels of the last three for what they are: no buffers of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from estimator.errors import InputError
from estimator.hardware import is_cpu
from estimator.setup import Setup

CHUNKS = 8
"""torchtune's ``num_output_chunks``."""
_IGNORED = -100
_COPIES = (("standard", "shifted"), ("standard", "shifted-and-half"), ("fused-kernel", "shifted"))
"""Losses and the copies that change their peak; published ones of fused kernels with 4.46 to 4.49 fit without any."""
_ROWS = 64
"""Rows that plain torch works on at once where a kernel works in place."""

Loss = Callable[..., torch.Tensor]


def use_loss(model: Any, setup: Setup, *, dry: bool) -> None:
    """Makes ``model`` (a transformers causal LM, or peft's around one) compute ``setup.loss`` in its forward pass.

    dry: on fake tensors. Raises InputError where the model's head or precision is not one that the loss knows.
    """
    copies = dry and not setup.compile and (setup.loss, setup.logit_copies) in _COPIES
    whole = setup.compile and setup.framework not in ("torchtitan", "torchtune")
    if setup.loss == "standard" and not copies and not (dry and whole):
        return
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    kernels = dry and not is_cpu(setup.accelerator)
    if setup.loss == "standard" and copies:
        pass
    elif setup.loss in ("standard", "compiled"):
        # transformers warns where a class's name has no loss (GPT2LMHeadModel), and a warning ends the compiled graph.
        compiled = functools.partial(_compiled, whole=whole and getattr(model, "loss_type", None) is not None)
        model.loss_function = compiled if dry else torch.compile(model.loss_function)
    elif setup.loss == "fused-kernel":
        model.loss_function = functools.partial(_fused_kernel, kernels=kernels)
    else:
        _take_head(model, setup, kernels=kernels)
    if copies:
        _copy_logits(model, setup)


def _copy_logits(model: Any, setup: Setup) -> None:
    """What transformers before 4.50 did: whatever loss follows gets shifted logits, a copy, and full labels' tail. Before
    4.46 the models themselves upcast, so that nobody held the half logits."""
    standard, head = model.loss_function, model.get_output_embeddings()

    def shifted(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **rest: Any) -> torch.Tensor:
        logits = logits.float()
        before = logits[..., :-1, :].contiguous()
        found: torch.Tensor = standard(
            before, labels, vocab_size, **(rest | {"shift_labels": labels[..., 1:].contiguous()})
        )
        return found

    model.loss_function = shifted
    if setup.logit_copies == "shifted":
        project = head.forward
        head.forward = lambda hidden: project(hidden).float()


def _take_head(model: Any, setup: Setup, *, kernels: bool) -> None:
    """Losses that multiply with the head themselves: the head hands its input on, and no logits are returned."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or getattr(model.config, "final_logit_softcapping", None):
        raise InputError(f"loss: {setup.loss} needs a plain head, which {setup.model} has not; write --loss standard")
    if head.bias is not None and setup.loss != "chunked":
        raise InputError(f"loss: {setup.loss} knows no head with a bias, as {setup.model} has; write --loss standard")
    project, forward, standard = head.forward, model.forward, model.loss_function
    taken = False

    def hand_on(hidden: torch.Tensor) -> torch.Tensor:
        return hidden if taken else project(hidden)

    def loss(logits: torch.Tensor, labels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        items = kwargs.get("num_items_in_batch")
        if not taken:
            return standard(logits, labels, *args, **kwargs)  # type: ignore[no-any-return]
        hidden = logits  # whatever transformers calls what the head hands on
        if setup.loss == "chunked":
            return _chunked(hidden, project, _next_tokens(labels), items)
        if setup.loss == "fused-linear":
            return _fused_linear(hidden, head.weight, _next_tokens(labels), items, kernels=kernels)
        return _cut(hidden, head.weight, labels)

    @functools.wraps(forward)
    def without_logits(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        # Without labels logits are what is wanted, and the packages of the fused losses evaluate with them.
        taken = kwargs.get("labels") is not None and (model.training or setup.loss == "chunked")
        outputs = forward(*args, **kwargs)
        kept = {name: value for name, value in outputs.items() if name != "logits"} if taken else outputs
        taken = False
        return type(outputs)(**kept)

    replaced: Any = head
    replaced.forward, model.forward, model.loss_function = hand_on, without_logits, loss


def _next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """labels: [batch, tokens]. Each position's target, of the same shape; none for the last."""
    return functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:].contiguous()


def _chunked(hidden: torch.Tensor, project: Any, targets: torch.Tensor, items: Any) -> torch.Tensor:
    """hidden: [batch, tokens, width]. All chunks' logits first, then each upcast and summed by itself."""
    logits = [project(part) for part in hidden.chunk(CHUNKS, dim=1)]
    count = (targets != _IGNORED).sum() if items is None else items
    total = torch.zeros((), device=hidden.device)
    for part, target in zip(logits, targets.chunk(CHUNKS, dim=1), strict=True):
        rows = part.reshape(-1, part.shape[-1]).float()
        total = total + functional.cross_entropy(rows, target.reshape(-1), ignore_index=_IGNORED, reduction="sum")
        del rows
    return total / count


def rows_at_once(rows: int, vocab: int, width: int) -> int:
    """Rows of the logits that Liger's fused linear loss makes at once: as many bytes as the hidden states, to a power of 2."""
    wanted = -(-rows // -(-vocab // width))
    return min(1 << (wanted - 1).bit_length(), rows)


def _fused_linear(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, items: Any, *, kernels: bool
) -> torch.Tensor:
    rows: torch.Tensor = hidden.reshape(-1, hidden.shape[-1])
    loss: torch.Tensor = _FusedLinear.apply(rows, weight, targets.view(-1), items, kernels)  # type: ignore[no-untyped-call]
    return loss


class _FusedLinear(torch.autograd.Function):
    """Both gradients are made in the forward pass, chunk by chunk, and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, items: Any, kernels: bool
    ) -> torch.Tensor:
        size = rows_at_once(hidden.shape[0], *weight.shape)
        hidden_gradient = torch.zeros_like(hidden)
        weight_gradient = torch.zeros_like(weight) if weight.requires_grad else None
        losses = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        known = targets != _IGNORED
        count = known.sum() if items is None else items
        for start in range(0, hidden.shape[0], size):
            chunk = slice(start, start + size)
            part = hidden[chunk]
            logits = part @ weight.t()
            _cross_entropy_in_place(logits, targets[chunk], losses[chunk], count, kernels=kernels)
            if logits.dtype == weight.dtype == hidden.dtype:
                torch.mm(logits, weight, out=hidden_gradient[chunk])
            else:
                hidden_gradient[chunk] = logits @ weight
            if weight_gradient is not None:
                _add_product(weight_gradient, logits.t(), part, kernels=kernels)
            del logits, part
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight = ctx.saved_tensors
        hidden.mul_(gradient)
        return hidden, None if weight is None else weight.mul_(gradient), None, None, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, kernels: bool) -> None:
    """``total += left @ right``, on a GPU without a buffer of ``total``'s size, whatever the types."""
    if kernels:
        right.to(left.dtype)
    elif total.dtype == left.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += (left @ right.to(left.dtype)).to(total.dtype)


def _cross_entropy_in_place(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, count: Any, *, kernels: bool
) -> None:
    """Replaces logits [rows, vocab] by the gradient of the mean loss, and fills ``losses`` [rows] with each row's share."""
    if kernels:
        return
    for start in range(0, logits.shape[0], _ROWS):
        part, wanted = logits[start : start + _ROWS], targets[start : start + _ROWS]
        scores, known = part.float(), wanted != _IGNORED
        wanted = wanted.clamp(min=0)[:, None]
        scores = scores - scores.logsumexp(-1, keepdim=True)
        losses[start : start + _ROWS] = -scores.gather(1, wanted)[:, 0] * known / count
        gradient = scores.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=scores.dtype))
        part.copy_(gradient.mul_(known[:, None]).div_(count))


def _fused_kernel(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *_: Any,
    num_items_in_batch: Any = None,
    shift_labels: torch.Tensor | None = None,
    kernels: bool,
    **__: Any,
) -> torch.Tensor:
    """As transformers calls it: on an fp32 copy of the logits, whose memory then holds their gradient."""
    logits = logits.float()
    rows = logits.view(-1, logits.shape[-1])
    targets = (_next_tokens(labels) if shift_labels is None else shift_labels).view(-1)
    loss: torch.Tensor = _InPlace.apply(rows, targets, num_items_in_batch, kernels)  # type: ignore[no-untyped-call]
    return loss


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, items: Any, kernels: bool) -> torch.Tensor:
        losses = torch.zeros(logits.shape[0], dtype=logits.dtype, device=logits.device)
        count = (targets != _IGNORED).sum() if items is None else items
        _cross_entropy_in_place(logits.detach(), targets, losses, count, kernels=kernels)
        ctx.save_for_backward(logits.detach())
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (logits,) = ctx.saved_tensors
        return logits.mul_(gradient), None, None, None


def _compiled(logits: torch.Tensor, labels: torch.Tensor, *_: Any, whole: bool, **__: Any) -> torch.Tensor:
    """What inductor makes of transformers' loss: one kernel reads the logits, another writes their gradient in their type.

    whole: the model is compiled with it, and its logits are outputs, whose gradients autograd has as zeros.
    """
    targets = _next_tokens(labels).view(-1)
    loss: torch.Tensor = _OnePass.apply(logits.view(-1, logits.shape[-1]), targets, whole)  # type: ignore[no-untyped-call]
    return loss


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, whole: bool) -> torch.Tensor:
        largest, log_sum = (torch.empty(logits.shape[0], 1, dtype=torch.float32) for _ in range(2))
        ctx.whole = whole
        ctx.save_for_backward(logits, targets, largest, log_sum)
        return largest.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        logits = ctx.saved_tensors[0]
        zeros = torch.zeros_like(logits) if ctx.whole else None
        found = torch.empty_like(logits)
        del zeros
        return found, None, None


def _cut(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The package's kernels know half precision only: autocast's copies of both operands are what is kept."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype == torch.float32:
        raise InputError("loss: cut-cross-entropy computes in half precision; write --precision bf16 or bf16-mixed")
    loss: torch.Tensor = _Cut.apply(hidden.reshape(-1, hidden.shape[-1]), weight, labels)  # type: ignore[no-untyped-call]
    return loss


class _Cut(torch.autograd.Function):
    """The buffers of ``cce_linear_cross_entropy`` with its defaults; the logits live in registers."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        count = labels.shape[0] * (labels.shape[1] - 1)
        found = torch.empty(count, 2, dtype=torch.int64)
        valid = found.to(torch.int32).sum(1)
        del found
        log_sum, product = (torch.empty(count, dtype=torch.float32) for _ in range(2))
        average = torch.empty(weight.shape[0], dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, log_sum, labels, valid, average)
        return product.mean()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, _, _, valid, average = ctx.saved_tensors
        order = average.argsort().to(torch.int32)
        hidden_gradient = torch.zeros_like(hidden)
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        across = math.ceil(weight.shape[1] / 64)
        locks = [torch.empty(math.ceil(n / 128), across, dtype=torch.int32) for n in (valid.numel(), weight.shape[0])]
        del order, locks
        return hidden_gradient, weight_gradient, None
