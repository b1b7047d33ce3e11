"""The optimizers that a dry run steps with: torch's, transformers', and stand-ins for those of packages that it does not need.
Loads torch on import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from estimator.building.model import decoder_layers
from estimator.memory.galore import RANK
from estimator.setup import Setup

_EIGHT_BIT_FROM, _PAGED_FROM, _BLOCK, _TABLE = 4096, 1e5, 256, 256


def build_optimizer(
    setup: Setup, trained: list[torch.nn.Parameter], model: torch.nn.Module, *, cuda: bool
) -> torch.optim.Optimizer:
    """What the framework would choose on the device, said explicitly: on fake tensors torch would choose otherwise."""
    kind = str(setup.optimizer)
    if kind == "sgd":
        return torch.optim.SGD(by_mesh(trained), lr=1e-5, foreach=True)
    if kind == "adafactor" and setup.framework == "hf-trainer":
        from transformers.optimization import Adafactor

        return Adafactor(trained, lr=1e-5, scale_parameter=False, relative_step=False)
    if kind == "adafactor":
        return torch.optim.Adafactor(trained, lr=1e-5, foreach=False)
    if kind == "adamw":
        # Trainer leaves the choice to torch, which is foreach on a GPU and one tensor at a time on a CPU.
        foreach = cuda or setup.framework == "torch-loop"
        return torch.optim.AdamW(by_mesh(trained), lr=1e-5, foreach=foreach, fused=False)
    if kind == "adamw-fused":
        return torch.optim.AdamW(by_mesh(trained), lr=1e-5, fused=True)
    if kind == "galore":
        return GaloreAdamW(trained, projected=[m.weight for m in _layers(model) if isinstance(m, torch.nn.Linear)])
    # Trainer has bitsandbytes keep wide states for embeddings.
    trainer = setup.framework == "hf-trainer"
    wide = [m.weight for m in model.modules() if trainer and isinstance(m, torch.nn.Embedding)]
    return BitsAndBytesAdamW(trained, eight_bit="8bit" in kind, paged="paged" in kind, wide=wide)


def by_mesh(trained: Sequence[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """A group for the parameters of each mesh, and one for whole ones: no kernel takes both (``Trainer.create_optimizer``)."""
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in trained:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{"params": parameters} for parameters in groups.values()]


class BitsAndBytesAdamW(torch.optim.Optimizer):
    """``bitsandbytes.optim.AdamW`` 0.50, read (``optim/optimizer.py``): its kernels take no memory of their own.

    Moments are fp32 whatever the parameter is, or 8-bit codes with an fp32 absmax a block of 256, from 4,096 elements on.
    Paged ones of 100,000 elements and more are unified memory, which is not the caching allocator's. wide: parameters with
    fp32 moments in any case.
    """

    def __init__(
        self, trained: list[torch.nn.Parameter], *, eight_bit: bool, paged: bool, wide: Sequence[torch.Tensor]
    ) -> None:
        super().__init__(trained, {"lr": 1e-5})
        self._eight_bit, self._paged, self._wide = eight_bit, paged, {id(parameter) for parameter in wide}
        self._tables: tuple[torch.Tensor, ...] = ()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Makes the states of parameters that have a gradient for the first time; the update itself allocates nothing."""
        assert closure is None
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter] = self._fresh(parameter)

    def _fresh(self, parameter: torch.nn.Parameter) -> dict[str, Any]:
        count = parameter.numel()
        narrow = self._eight_bit and count >= _EIGHT_BIT_FROM and id(parameter) not in self._wide
        state: dict[str, Any] = {"step": 0}
        if narrow and not self._tables:
            self._tables = (torch.empty(_TABLE), torch.empty(_TABLE))
        if not (self._paged and count >= _PAGED_FROM):
            dtype = torch.uint8 if narrow else torch.float32
            state["state1"] = torch.zeros_like(parameter, dtype=dtype)
            state["state2"] = torch.zeros_like(parameter, dtype=dtype)
        if narrow:
            blocks = -(-count // _BLOCK)
            state["qmap1"], state["qmap2"] = self._tables
            state["absmax1"] = parameter.new_zeros(blocks, dtype=torch.float32)
            state["absmax2"] = parameter.new_zeros(blocks, dtype=torch.float32)
        return state


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for layer in decoder_layers(model):
        yield from layer.modules()


class GaloreAdamW(torch.optim.Optimizer):
    """``galore_torch.GaLoreAdamW`` by its allocations (``estimator.memory.galore``); projections are renewed in every step, as they are
    in the 200th, when all states exist. Gradients are [rows, columns]; the shorter side is projected."""

    def __init__(self, trained: list[torch.nn.Parameter], *, projected: Sequence[torch.Tensor]) -> None:
        chosen = {id(parameter) for parameter in projected}
        plain = [parameter for parameter in trained if id(parameter) not in chosen]
        super().__init__([*plain, *(p for p in trained if id(p) in chosen)], {"lr": 1e-5})
        self._projected = chosen

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One tensor after the other, those that are not projected first."""
        assert closure is None
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state, gradient = self.state[parameter], parameter.grad
            if id(parameter) in self._projected:
                self._renew(state, gradient)
                gradient = _narrowed(gradient, state["projection"])
            for name in ("first", "second"):
                if name not in state:
                    state[name] = torch.zeros_like(gradient)
            update = state["first"] / state["second"].sqrt()
            if id(parameter) in self._projected:
                update = _widened(update, state["projection"]) * 0.25
            parameter.add_(update)

    def _renew(self, state: dict[str, Any], gradient: torch.Tensor) -> None:
        """The projection's old storage lives until the new one is there."""
        left, values, right = torch.linalg.svd(gradient.float(), full_matrices=False)
        rank = min(RANK, len(values))
        if gradient.shape[0] >= gradient.shape[1]:
            left[:, :rank] @ torch.diag(values[:rank])
            state["projection"] = right[:rank].to(gradient.dtype)
        else:
            torch.diag(values[:rank]) @ right[:rank]
            state["projection"] = left[:, :rank].to(gradient.dtype)


def _narrowed(gradient: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    tall = gradient.shape[0] >= gradient.shape[1]
    return gradient @ projection.t() if tall else projection.t() @ gradient


def _widened(update: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    tall = update.shape[0] >= update.shape[1]
    return update @ projection if tall else projection @ update
