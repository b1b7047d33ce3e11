"""Decoder layers as inductor compiles them, by what it allocates. Loads torch on import.

Each layer is traced by AOT autograd and cut into a forward and a backward graph by inductor's own partitioner, so that what is
kept between them is exact. Of a graph's values only these take memory: results of kernels that are not inductor's own (matrix
products, attention), what those read, and what the graph returns; all else is fused into the kernels that read it.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

from estimator.dryrun.private_api import reparametrized, trace_and_partition, without_innermost_mode
from estimator.errors import InputError
from estimator.memory.selective import policy
from estimator.setup import Setup

_aten = torch.ops.aten
_VIEWS = frozenset(
    {
        _aten.view.default, _aten._unsafe_view.default, _aten.permute.default, _aten.transpose.int, _aten.t.default,
        _aten.expand.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.slice.Tensor,
        _aten.select.int, _aten.alias.default, _aten.detach.default, _aten.split.Tensor, _aten.split_with_sizes.default,
    }
)  # fmt: skip
_KERNELS = frozenset(
    {
        _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default,
        _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_flash_attention_backward.default,
        _aten._scaled_dot_product_efficient_attention.default, _aten._scaled_dot_product_efficient_attention_backward.default,
        _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_cudnn_attention_backward.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    }
)  # fmt: skip
"""What inductor calls rather than generates."""
_GENERATED = frozenset(
    {
        _aten.sum.dim_IntList, _aten.sum.default, _aten.mean.dim, _aten.amax.default, _aten.full.default, _aten.clone.default,
        _aten.cat.default, _aten.slice_scatter.default, _aten.select_scatter.default, _aten.var_mean.correction,
        _aten.copy.default, torch.ops.prims.convert_element_type.default, _aten.scalar_tensor.default,
        _aten.lift_fresh_copy.default,
    }
)  # fmt: skip
"""What it generates beside everything pointwise."""


BY_LAYER = ("torchtitan", "torchtune")
"""Frameworks that compile each layer by itself; the others compile the model."""


def compile_layers(layers: Iterable[Any], setup: Setup) -> None:
    """From here on each layer's forward pass runs its two graphs; layers that are alike share them.

    Checkpointing is the partitioner's work here.
    """
    graphs: dict[Any, Callable[..., Any]] = {}
    mark = functools.partial(_mark, setup.checkpointing, setup.framework not in BY_LAYER)
    for layer in layers:
        layer.gradient_checkpointing = False
        layer.forward = functools.partial(_run, layer, layer.forward, graphs, mark)


@contextlib.contextmanager
def gradients_at_the_end(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """A compiled backward pass returns all gradients at once; only then are they added to those of earlier micro-batches."""
    before = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    for parameter, _ in before:
        parameter.grad = None
    yield
    for parameter, gradient in before:
        if gradient is not None and parameter.grad is not None:
            parameter.grad = gradient.add_(parameter.grad)


def _run(layer: Any, forward: Any, graphs: dict[Any, Callable[..., Any]], mark: Any, *args: Any, **kwargs: Any) -> Any:
    leaves, tree = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    names, parameters = zip(*layer.named_parameters(), strict=True)
    inputs = [leaves[i] for i in places]
    state = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    key = (type(layer), names, state, *((t.shape, t.dtype, t.requires_grad) for t in (*parameters, *inputs)))
    for place in places:
        leaves[place] = None

    def functional(given: list[torch.Tensor], tensors: list[torch.Tensor]) -> Any:
        filled = list(leaves)
        for place, value in zip(places, tensors, strict=True):
            filled[place] = value
        inner, options = pytree.tree_unflatten(filled, tree)
        with reparametrized(layer, dict(zip(names, given, strict=True))):
            return forward(*inner, **options)

    del args, kwargs
    if key not in graphs:
        # Tracing runs everything once, of which nothing counts, and keeps what it ran with.
        with without_innermost_mode():
            graphs[key] = trace_and_partition(functional, _executor, mark)
            graphs[key](list(parameters), [_like(tensor) for tensor in inputs])
    return graphs[key](list(parameters), inputs)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return fresh.requires_grad_(tensor.requires_grad)


def _mark(checkpointing: str, whole: bool, graph: fx.Graph) -> None:
    """Says of a joint graph's forward operators what the partitioner may keep, as ``torch.compile`` does in a checkpoint."""
    if checkpointing == "none":
        if whole:
            _keep_stream(graph)
        return
    choose = policy() if checkpointing == "selective" else lambda _: CheckpointPolicy.PREFER_RECOMPUTE
    for node in graph.nodes:
        if node.op == "call_function" and node.meta.get("partitioner_tag") != "is_backward":
            picked = node.target is operator.getitem
            node.meta["recompute"] = node.args[0].meta["recompute"] if picked else choose(node.target)
            node.meta["ac_graph_id"] = 0


def _keep_stream(graph: fx.Graph) -> None:
    """In a whole model's graph the partitioner keeps the residual stream at each sum, since all of them depend on one another;
    in one layer's it would rather keep what is added, which under autocast is half as wide."""
    for node in graph.nodes:
        if node.target is _aten.add.Tensor and node.meta.get("partitioner_tag") != "is_backward":
            shape = node.meta["val"].shape
            if any(source.op == "placeholder" and source.meta["val"].shape == shape for source in node.all_input_nodes):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _executor(module: fx.GraphModule, _: Any) -> Callable[[list[Any]], Any]:
    """Runs a graph by its allocations; takes its arguments in a list that it empties, as inductor's code does."""
    plan = _Plan(module.graph)

    def run(arguments: list[Any]) -> Any:
        given = list(arguments)
        arguments.clear()
        return plan.run(given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _Plan:
    """Which values of a graph take memory, and after which step each is no longer read."""

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes = list(graph.nodes)
        self._output = self._nodes[-1]
        assert self._output.op == "output"
        kept = {_owner(node) for node in self._output.all_input_nodes}
        for node in self._nodes:
            if node.target in _KERNELS:
                kept |= {_owner(source) for source in node.all_input_nodes}
            elif node.op == "call_function" and not _is_known(node):
                raise InputError(f"compile: a dry run does not know how {node.target} is compiled; leave it out")
        self._made = {n for n in kept if n.op == "call_function" and not _is_given(n)}
        self._reads = {n: self._sources(n) for n in self._nodes if n in self._made or _is_given(n) or n is self._output}
        last = {source: reader for reader, sources in self._reads.items() for source in sources}
        self._dying: dict[fx.Node, list[fx.Node]] = {}
        for source, reader in last.items():
            self._dying.setdefault(reader, []).append(source)
        self._unread = {n for n in self._reads if n not in last and n is not self._output}

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The values in memory that a step reads, through whatever is fused into it."""
        found: dict[fx.Node, None] = {}
        waiting = list(node.all_input_nodes)
        while waiting:
            source = waiting.pop()
            if source.op == "placeholder" or _is_given(source) or source in self._made:
                found[source] = None
            else:
                waiting += source.all_input_nodes
        return list(found)

    def run(self, arguments: list[Any]) -> Any:
        held: dict[fx.Node, Any] = {}
        arguments.reverse()
        for node in self._nodes:
            if node.op == "placeholder":
                held[node] = arguments.pop()
        for node in self._nodes:
            if node is self._output:
                break
            dying = self._dying.get(node, [])
            if _is_given(node):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _resolve(source, held))
                held[node] = node.target(*args, **kwargs)
                del args, kwargs
            elif node in self._made:
                value = node.meta["val"]
                # A kernel of inductor's writes over what it reads for the last time, where that has the same size.
                over = next((s for s in dying if _bytes(held[s]) == value.untyped_storage().nbytes()), None)
                if over is not None:
                    held[over] = None
                held[node] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            else:
                continue
            for source in dying:
                del held[source]
            if node in self._unread:
                del held[node]
        return fx.node.map_arg(self._output.args[0], lambda source: _resolve(source, held))


def _bytes(value: Any) -> int:
    return value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else -1


def _target(node: fx.Node) -> Any:
    """The operator, of one of several results that of them all."""
    return node.args[0].target if node.target is operator.getitem else node.target  # type: ignore[union-attr]


def _is_view(node: fx.Node) -> bool:
    return _target(node) in _VIEWS


def _is_given(node: fx.Node) -> bool:
    """A kernel's result, or one of several."""
    return _target(node) in _KERNELS


def _is_known(node: fx.Node) -> bool:
    target = _target(node)
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return pointwise or target in _VIEWS or target in _GENERATED or target in _KERNELS


def _owner(node: fx.Node) -> fx.Node:
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _resolve(node: fx.Node, held: dict[fx.Node, Any]) -> Any:
    """A value in memory, or a view of one."""
    if node in held:
        return held[node]
    assert _is_view(node), node
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _resolve(source, held))
    return node.target(*args, **kwargs)  # type: ignore[operator]
