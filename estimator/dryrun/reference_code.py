"""Recurrences and short convolutions in transformers' own PyTorch code, where GPUs may have a package's kernels.

Those are Triton's or CUDA's and run on no fake tensor. Loads torch on import.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from estimator.dryrun.private_api import replaced


@contextlib.contextmanager
def reference_code(model: torch.nn.Module, packages: set[str]) -> Iterator[None]:
    """What ``use_kernel_func_from_hub_with_fallback`` of transformers wraps runs as what it wraps; ``packages`` gets the names
    of those whose kernels were asked for."""
    with contextlib.ExitStack() as stack:
        for module in {sys.modules[type(part).__module__] for part in model.modules()}:
            for name, value in list(vars(module).items()):
                package = _package(value)
                if package is not None:
                    stack.enter_context(replaced(module, name, _noted(value.__wrapped__, package, packages)))
        yield


def _package(value: Any) -> str | None:
    if not inspect.isfunction(value) or not {"package", "torch_function"} <= set(value.__code__.co_freevars):
        return None
    cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
    return str(cells["package"].cell_contents)


def _noted(function: Callable[..., Any], package: str, packages: set[str]) -> Callable[..., Any]:
    known = inspect.signature(function).parameters
    every = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        packages.add(package)
        return function(*args, **{name: value for name, value in kwargs.items() if every or name in known})

    return run
