"""Where the program is: the phase of the step, the module and the decoder layer at work. Loads torch on import."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch

from estimator.dryrun.private_api import executing_node, next_sequence_number


class Position:
    """In the forward pass modules say where it is; in backward the nodes of autograd, which are numbered as forward made them.

    layers: the model's repeated layers.
    """

    def __init__(self, model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._layer_of = {id(module): index for index, layer in enumerate(layers) for module in layer.modules()}
        self._layer_names = [self._names[id(layer)] for layer in layers]
        self._layer_heads = {id(layer) for layer in layers}
        self.last_layer = max(self._layer_of.values(), default=0)
        self.layer: int | None = None
        self.phase = "load"
        self._module = ""
        self._starts: list[int] = []
        self._started: list[int | None] = []
        self._recomputed = 0

    def begin(self, phase: str) -> None:
        """The next phase of the step."""
        self.phase, self.layer, self._module = phase, None, ""
        if phase == "forward":
            self._starts, self._started = [], []
        if phase == "backward":
            self._recomputed = next_sequence_number()

    def leave_layers(self) -> None:
        """Backward has passed: what dies with the graph is of the layer that it was allocated for."""
        self.layer = None

    def enter_module(self, module: torch.nn.Module, _: Any) -> None:
        """A forward pre-hook of every module."""
        self._module = self._names.get(id(module), self._module)
        if id(module) in self._layer_heads:
            self.layer = self._layer_of[id(module)]
            self._number(self.layer)

    def leave_module(self, module: torch.nn.Module, *_: Any) -> None:
        """A forward hook of every module."""
        self._module = self._names.get(id(module), self._module).rpartition(".")[0]
        if id(module) in self._layer_heads and self.layer == self.last_layer and self.phase != "backward":
            self.layer = None
            self._number(None)

    def _number(self, layer: int | None) -> None:
        """From here on autograd's nodes are this layer's."""
        number = next_sequence_number()
        if self._starts and number < self._starts[-1]:
            return
        self._starts.append(number)
        self._started.append(layer)

    def locate(self, layer_of: Callable[[torch.Tensor], int | None]) -> None:
        """Moves to the layer of the node that backward executes; ``layer_of`` a parameter whose gradient it accumulates."""
        node = executing_node()
        if node is None:
            return
        number, parameter = node
        if parameter is not None:
            self.layer = layer_of(parameter)
            return
        if number >= self._recomputed:
            return  # reentrant checkpointing's own backward: of the layer that it recomputes
        at = bisect_right(self._starts, number) - 1
        self.layer = self._started[at] if at >= 0 else None

    def holder(self) -> str:
        """The module at work; of backward's formulas only the layer is known."""
        if self.phase == "backward" and not torch.is_grad_enabled():
            return "" if self.layer is None else self._layer_names[self.layer]
        return self._module
