"""Everything that this package takes from torch's private interface, in one place.

Names without a promise: ``FakeTensorMode``, dispatch modes, the node that autograd executes and its sequence number, and use
counts. Checked with torch 2.13.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode", "creates_storage", "executing_node", "fake_mode", "next_sequence_number"]

# AccumulateGrad has the largest number, so that it runs as soon as it can.
_NO_NUMBER = 2**63


def fake_mode() -> Any:
    """Tensors with shapes and storages but without memory; real ones may take part as constants."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def next_sequence_number() -> int:
    """The number that autograd will give to the next node of a forward pass."""
    return int(torch._C._autograd._get_sequence_nr())


def executing_node() -> tuple[int, torch.Tensor | None] | None:
    """(sequence number, parameter) of the node that backward executes; the parameter where it accumulates a gradient.

    ``None`` outside backward.
    """
    node: Any = torch._C._current_autograd_node()
    if node is None:
        return None
    number = int(node._sequence_nr())
    return (number, node.variable) if number >= _NO_NUMBER else (number, None)


# A fake tensor that only autograd's input buffer holds: one use each of the Python object, the argument list, the buffer and
# the call; its storage has one use by the tensor and one by the Python object that asks.
_SOLE_TENSOR_USES, _SOLE_STORAGE_USES = 4, 2


def held_by_nobody_else(tensor: torch.Tensor) -> bool:
    """Whether autograd would add to this gradient in place (``can_accumulate_inplace`` of input_buffer.cpp, which never
    holds for fake tensors). Views keep their base alive, and so never qualify."""
    if int(tensor._use_count()) > _SOLE_TENSOR_USES:  # type: ignore[attr-defined]
        return False
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) <= _SOLE_STORAGE_USES


def run_backward(loss: torch.Tensor) -> None:
    """``loss.backward()``, which is a function that modes can override: it would run with them off, and with it whatever
    checkpointing recomputes."""
    from torch.autograd.graph import _engine_run_backward

    start = torch.ones_like(loss, memory_format=torch.preserve_format)
    _engine_run_backward((loss,), (start,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def creates_storage(operator: Any) -> bool:
    """Whether an operator can return new memory: some output of its schema is not an alias of an input."""
    returns = operator._schema.returns
    return any(value.alias_info is None for value in returns)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """``owner.name`` is ``value`` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def trace_and_partition(
    function: Callable[..., Any], executor: Callable[..., Any], mark: Callable[[Any], None]
) -> Callable[..., Any]:
    """``function`` traced at its first call into a forward and a backward graph as ``torch.compile`` would cut them.

    ``executor(graph module, example inputs)`` makes what runs each; ``mark(graph)`` sees both before they are cut.
    """
    from torch._functorch import partitioners
    from torch._functorch.aot_autograd import aot_function
    from torch._inductor.decomposition import select_decomp_table

    def partition(joint: Any, *args: Any, **kwargs: Any) -> Any:
        mark(joint.graph)
        # Attention without dropout draws nothing, though its operator could: its random state need not be kept.
        with replaced(partitioners, "has_recomputable_rng_ops", lambda graph: False):
            return partitioners.min_cut_rematerialization_partition(joint, *args, **kwargs)

    traced: Callable[..., Any] = aot_function(
        function, executor, executor, partition_fn=partition, decompositions=select_decomp_table()
    )
    return traced


def without_innermost_mode() -> Any:
    """A context in which the dispatch mode that was entered last is not asked."""
    from torch.utils._python_dispatch import _pop_mode_temporarily

    return _pop_mode_temporarily()


def reparametrized(module: torch.nn.Module, parameters: dict[str, torch.Tensor]) -> Any:
    """A context in which a module's parameters are these tensors."""
    from torch.nn.utils.stateless import _reparametrize_module

    return _reparametrize_module(module, parameters)
