"""What FSDP1's hooks keep of reentrant checkpointing up to the end of backward. Loads torch on import.

To free a frozen unit it waits for the gradients of the unit's inputs, with hooks that refer to the nodes that they hang on
(``_register_post_backward_reshard_only_hook``, ``register_multi_grad_hook``). Of an input that was detached to be recomputed
from, this node is the one that accumulates its gradient, which holds the tensor, and with it the gradient. So it is where
the unit's hooks are run again as it is recomputed: in transformers 4, which checkpoints a layer's call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from estimator.dryrun.tracker import Tracker


def keep_inputs(layers: Sequence[torch.nn.Module], tracker: Tracker) -> None:
    """From now on each layer's input that is recomputed from lives, with its gradient, until backward ends."""
    kept: list[torch.Tensor] = []
    engine: Any = torch.autograd.Variable._execution_engine

    def release() -> None:
        tracker.position.leave_layers()
        while kept:  # from the last layer on, as backward came to them
            kept.pop(0).grad = None

    def keep(tensor: torch.Tensor) -> None:
        if tracker.position.phase == "backward" and tensor.is_leaf and tensor.requires_grad:
            if not kept:
                engine.queue_callback(release)
            kept.append(tensor)

    for layer in layers:
        checkpointed: Any = layer
        checkpointed._gradient_checkpointing_func = _keeping(checkpointed._gradient_checkpointing_func, keep)


def _keeping(checkpoint: Any, keep: Callable[[torch.Tensor], None]) -> Any:
    """A checkpointing function whose functions show their first input, which is the layer's."""

    def called(function: Any, *args: Any) -> Any:
        def shown(*inputs: Any) -> Any:
            keep(inputs[0])
            return function(*inputs)

        return checkpoint(shown, *args)

    return called
