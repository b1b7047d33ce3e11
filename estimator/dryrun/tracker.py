"""Sees every storage of fake tensors come and go, and writes the stream of events. Loads torch on import."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from estimator.dryrun.cuda_kernels import MATRIX_PRODUCTS, kernel_buffers
from estimator.dryrun.events import Storage, Stream
from estimator.dryrun.position import Position
from estimator.dryrun.private_api import (
    TorchDispatchMode,
    creates_storage,
    held_by_nobody_else,
)

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_AS_NUMBER = _aten._local_scalar_dense.default
_RNG_STATE_BYTES = 5056


class Tracker(TorchDispatchMode):
    """A dispatch mode over the fake one; ``stream`` is what it has seen.

    layers: the model's repeated layers. vocab: the width that marks logits. workspace_bytes: what cuBLAS takes in each
    thread that calls it; 0 for a CPU, whose kernels' own buffers are not modelled.
    """

    def __init__(
        self, model: torch.nn.Module, layers: Sequence[torch.nn.Module], *, vocab: int, workspace_bytes: int, cuda: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream = Stream()
        self.host_scalars = False
        """Zero-dimensional tensors are on the host: an optimizer's step counters."""
        self._vocab, self._workspace, self._cuda = vocab, workspace_bytes, cuda
        self.position = Position(model, layers)
        """Which layer and module are at work."""
        self._live: dict[int, tuple[int, Any]] = {}
        self._parameters: dict[int, str] = {}
        self._creates: dict[Any, bool] = {}
        self._threads: set[str] = set()
        self._waiting: list[int] | None = None
        self.wrappers: tuple[type, ...] = ()
        """Tensor classes whose own rules say what is run on the tensors within."""
        self.stream_number: Callable[[], int] = lambda: 0
        """Of the stream in which memory is allocated."""
        self.homes: dict[int, int] = {}
        """Layers of parameters that are part of a larger storage, by their own one's number."""
        self.collectives: dict[Any, Callable[[Any], tuple[int, ...]]] = {}
        """Buffers that collectives on a CPU take while they run."""
        self.waits: Any = None
        """The operator that returns its argument once it is there, which fake tensors have as a copy."""
        self._purpose: str | None = None
        self._blind = False
        self._outer: Any = None
        """The operator that a wrapper is just taking apart."""

    # --- where the program is -------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """The next phase of the step."""
        self.position.begin(phase)
        self.stream.begin(phase)

    def _locate(self) -> None:
        """In backward the layer is that of the node at work."""
        if self.position.phase == "backward":
            self.position.locate(self._layer_of)

    def _layer_of(self, parameter: torch.Tensor) -> int | None:
        known = self._live.get(_key(parameter))
        return self.stream.storages[known[0]].layer if known else self.homes.get(_key(parameter))

    # --- storages -------------------------------------------------------------------------------------------------

    def adopt(self, tensor: torch.Tensor, *, category: str, layer: int | None, holder: str) -> None:
        """A tensor that exists already: a parameter, a buffer, the batch."""
        self._record(getattr(tensor, "_local_tensor", tensor), category, layer, holder, layer)

    def recategorize(self, tensor: torch.Tensor, category: str, holder: str | None = None) -> None:
        """Now it is known what a tensor was for."""
        known = self._live.get(getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata)
        if known is not None:
            storage = self.stream.storages[known[0]]
            storage.category = category
            storage.holder = storage.holder if holder is None else holder

    def category(self, tensor: torch.Tensor) -> str | None:
        """What a tracked tensor is for."""
        known = self._live.get(tensor.untyped_storage()._cdata)
        return None if known is None else self.stream.storages[known[0]].category

    def holder(self, tensor: torch.Tensor) -> str | None:
        """The module that a tracked tensor belongs to."""
        known = self._live.get(getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata)
        return None if known is None else self.stream.storages[known[0]].holder

    def _record(
        self,
        tensor: torch.Tensor,
        category: str,
        layer: int | None,
        holder: str,
        event_layer: int | None,
        bytes_of_layers: dict[int, int] | None = None,
    ) -> None:
        handle = tensor.untyped_storage()
        key = handle._cdata
        if key in self._live or not handle.nbytes():
            return
        index = self.stream.birth(
            Storage(
                bytes=handle.nbytes(),
                category=self._purpose or category,
                layer=layer,
                holder=holder,
                bytes_of_layers=bytes_of_layers or {},
                stream=self.stream_number(),
            ),
            event_layer,
        )
        self._live[key] = (index, weakref.ref(handle, lambda _: self._died(key, index)))

    def allocated(self, tensor: torch.Tensor) -> None:
        """A storage that was emptied has been given memory again."""
        self._locate()
        layer = self.position.layer
        self._record(tensor, "communication", layer, self.position.holder(), layer)

    def freed(self, tensor: torch.Tensor) -> None:
        """A storage is about to be emptied."""
        known = self._live.pop(tensor.untyped_storage()._cdata, None)
        if known is not None:
            self._bury(known[0])

    @contextlib.contextmanager
    def purpose(self, category: str) -> Iterator[None]:
        """What is allocated meanwhile is for this."""
        before, self._purpose = self._purpose, category
        try:
            yield
        finally:
            self._purpose = before

    @contextlib.contextmanager
    def blind(self) -> Iterator[None]:
        """What is run meanwhile is not this rank's."""
        before, self._blind = self._blind, True
        try:
            yield
        finally:
            self._blind = before

    @contextlib.contextmanager
    def deaths_in_order(self) -> Iterator[None]:
        """For deaths in an order that depends on addresses: they are written in the order of births."""
        self._waiting = []
        try:
            yield
        finally:
            waiting, self._waiting = self._waiting, None
            for index in sorted(waiting):
                self._bury(index)

    def _died(self, key: int, index: int) -> None:
        del self._live[key]
        if self._waiting is None:
            self._bury(index)
        else:
            self._waiting.append(index)

    def _bury(self, index: int) -> None:
        layer = self.position.layer if self.position.layer is not None else self.stream.storages[index].layer
        self.stream.death(index, layer)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device
        if func is _AS_NUMBER and self.host_scalars:
            return 1.0  # optimizers read their step counters and norms; any number does
        if func is self.waits and not self._wrapped(types):
            return args[0]
        kwargs = kwargs or {}
        if self._wrapped(types):
            self._outer = func
            return NotImplemented
        if self._blind:
            return func(*args, **kwargs)
        creates = self._creates.get(func)
        if creates is None:
            creates = self._creates[func] = creates_storage(func)
        if not creates:
            return func(*args, **kwargs)
        if self.position.phase == "backward":
            self._locate()
            adds_gradients = func is _aten.add.Tensor and not torch.is_grad_enabled() and _same_kind(args)
            if func is self._outer:  # a wrapper's, into which autograd adds nothing in place
                adds_gradients, self._outer = False, None
            # Autograd adds up the gradients of a tensor that was used twice, into the first where nobody else holds it.
            if adds_gradients and held_by_nobody_else(args[0]):
                return args[0].add_(args[1])
        if self._workspace and func in MATRIX_PRODUCTS:
            self._take_workspace()
        found = func(*args, **kwargs)
        outputs = found if isinstance(found, (tuple, list)) else (found,)
        for position, output in enumerate(outputs):
            if isinstance(output, torch.Tensor):
                self._born(output, func, args, position)
        if self._cuda:
            self._buffers(kernel_buffers(func, args))
        elif func in self.collectives:
            self._buffers(self.collectives[func](args))
        return found

    def _wrapped(self, types: Any) -> bool:
        return bool(self.wrappers) and any(issubclass(kind, self.wrappers) for kind in types)

    def _born(self, tensor: torch.Tensor, func: Any, args: Any, position: int) -> None:
        handle = tensor.untyped_storage()
        if handle._cdata in self._live:
            return
        if self._cuda and (
            (self.host_scalars and not tensor.dim())
            or (handle.nbytes() == _RNG_STATE_BYTES and tensor.dtype == torch.uint8)
        ):
            return  # on the host
        source = self._source(args, position)
        layer = self.position.layer
        parts: dict[int, int] = {}
        if layer is None and source is not None and self.position.phase in ("optimizer", "between"):
            layer = source.layer
        if func is _aten.stack.default and self.position.phase == "optimizer":
            # One element for each gradient.
            for part in args[0]:
                own = self._known(part)
                if own is not None and own.layer is not None:
                    parts[own.layer] = parts.get(own.layer, 0) + tensor.element_size()
        self._record(tensor, self._categorize(tensor, func, source), layer, self.position.holder(), layer, parts)

    def _known(self, tensor: Any) -> Storage | None:
        if not isinstance(tensor, torch.Tensor):
            return None
        known = self._live.get(tensor.untyped_storage()._cdata)
        return None if known is None else self.stream.storages[known[0]]

    def _source(self, args: Any, position: int) -> Storage | None:
        """What the first input is, of a list the one at the output's position."""
        if not args:
            return None
        first = args[0]
        if isinstance(first, (list, tuple)):
            first = first[position] if position < len(first) else None
        return self._known(first)

    def _categorize(self, tensor: torch.Tensor, func: Any, source: Storage | None) -> str:
        if self.position.phase == "optimizer" or self.position.phase == "between":
            return "temporaries"
        wide = tensor.dim() > 0 and tensor.shape[-1] == self._vocab and self.position.layer is None
        if wide and (source is None or source.category != "parameters"):
            return "logits"
        if func is _aten._to_copy.default and source is not None and source.category == "parameters":
            return "temporaries"  # autocast's copy of a weight
        if self.position.phase == "backward" and not torch.is_grad_enabled():
            return "temporaries"
        return "activations"

    def _take_workspace(self) -> None:
        thread = "backward" if self.position.phase == "backward" else "forward"
        if thread in self._threads:
            return
        self._threads.add(thread)
        self.stream.birth(
            Storage(bytes=self._workspace, category="workspace", layer=None, holder=f"cuBLAS, {thread}"),
            self.position.layer,
        )

    def _buffers(self, sizes: tuple[int, ...]) -> None:
        layer, holder = self.position.layer, self.position.holder()
        born = [
            self.stream.birth(Storage(bytes=size, category="temporaries", layer=layer, holder=holder), layer)
            for size in sizes
        ]
        for index in reversed(born):
            self.stream.death(index, layer)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _same_kind(args: Any) -> bool:
    first, second = args[0], args[1]
    return (
        isinstance(second, torch.Tensor)
        and first.shape == second.shape
        and first.dtype == second.dtype
        and first.dim() > 0
    )
