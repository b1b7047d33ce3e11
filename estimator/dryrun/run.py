"""The entry of the dry run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging as standard_logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from estimator.conventions import conventions
from estimator.dryrun.checks import check_activations
from estimator.dryrun.cut import Cut, whole
from estimator.dryrun.libraries import check_libraries
from estimator.dryrun.parallel import check_parallel, same_in_depth
from estimator.dryrun.result import DryRun
from estimator.errors import InputError, MissingError
from estimator.hardware import is_cpu
from estimator.model.catalog import resolve_model
from estimator.setup import LOSSES, OPTIMIZERS, QUANTIZATIONS, Setup

if TYPE_CHECKING:
    from estimator.dryrun.operators import OperatorCounter
    from estimator.dryrun.tracker import Tracker
    from estimator.dryrun.work import OperatorWork

_ASKS_FOR_VALUES = ("DataDependentOutputException", "DynamicOutputShapeException")


def dry_run(setup: Setup, *, steps: int = 2, capacity_bytes: int | None = None, every_layer: bool = False) -> DryRun:
    """Executes ``steps`` optimizer steps of ``setup`` on fake tensors and replays their allocations.

    capacity_bytes: what the device has for the allocator; ``None``: as much as it takes. every_layer: also those are
    executed that do what others did; the result is the same. Raises InputError for what cannot be dry-run, MissingError
    without torch.
    """
    setup = _as_run(setup)
    with _quiet_libraries(), _countable():
        return _run(setup, steps=steps, capacity_bytes=capacity_bytes, every_layer=every_layer)


def count_operators(setup: Setup) -> OperatorWork:
    """The operators of one step of ``setup``, with as few layers executed as determine the rest. Raises as ``dry_run``."""
    try:
        from estimator.dryrun.depth import write_out
        from estimator.dryrun.layer_kinds import plan_cut
        from estimator.dryrun.operators import OperatorCounter
        from estimator.dryrun.steps import record
    except ImportError as error:
        raise _missing(error) from None
    setup = _as_run(setup)
    vocab = resolve_model(setup.model).vocab
    counters: list[OperatorCounter] = []

    def count(tracker: Tracker) -> OperatorCounter:
        counters.append(OperatorCounter(tracker, vocab=vocab, seq=setup.seq))
        return counters[-1]

    with _quiet_libraries(), _countable():
        cut = plan_cut(setup, every=not same_in_depth(setup))
        stream = record(_cut(setup, cut), steps=1, layers=cut.kept, count=count)
        if write_out(stream, cut) is None:
            cut = whole(len(cut.samples))
            record(setup, steps=1, layers=None, count=count)
    return counters[-1].work(cut)


def _missing(error: ImportError) -> MissingError:
    return MissingError(f"dry_run: needs {error.name}; pip install 'vramcalc-toolkit[all]'")


def _as_run(setup: Setup) -> Setup:
    """``setup`` resolved and checked, with the stand-ins for what is not run itself."""
    setup = setup.resolved()
    check_dry_runnable(setup)
    if setup.attention == "flash":  # the flash-attn package keeps what torch's flash kernel keeps
        setup = dataclasses.replace(setup, attention="sdpa", attention_kernel="flash")
    if setup.optimizer == "adamw" and conventions(setup).fused_optimizer:
        setup = dataclasses.replace(setup, optimizer="adamw-fused")
    if str(setup.base_quantization).startswith("gptq"):  # its kernels that have a backward pass know fp16 only
        precision, autocast = setup.precision.replace("bf16", "fp16"), "fp16" if setup.autocast else None
        setup = dataclasses.replace(setup, precision=precision, autocast=autocast)
    return setup


def _cut(setup: Setup, cut: Cut) -> Setup:
    """``setup`` for those of its layers that are run."""
    if setup.trainable_layers is None or len(cut.kept) == len(cut.samples):
        return setup
    frozen = len(cut.samples) - setup.trainable_layers
    return dataclasses.replace(setup, trainable_layers=sum(layer >= frozen for layer in cut.kept))


def _run(setup: Setup, *, steps: int, capacity_bytes: int | None, every_layer: bool) -> DryRun:
    try:
        from estimator.dryrun.depth import write_out
        from estimator.dryrun.layer_kinds import plan_cut
        from estimator.dryrun.replay import replay
        from estimator.dryrun.steps import record
    except ImportError as error:
        raise _missing(error) from None
    cut = plan_cut(setup, every=every_layer or not same_in_depth(setup))
    written = write_out(record(_cut(setup, cut), steps=steps, layers=cut.kept), cut)
    if written is None:
        cut = whole(len(cut.samples))
        written = record(setup, steps=steps, layers=None)
    return replay(
        written,
        cuda=not is_cpu(setup.accelerator),
        capacity_bytes=capacity_bytes,
        expandable_segments=setup.expandable_segments,
        empties_cache=setup.framework == "torch-loop",
        layers_run=len(cut.kept),
    )


_REMARKING = ("_subclasses.fake_tensor", "distributed.tensor._redistribute")


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """What the libraries remark on a config or a kernel concerns nobody who wants its memory; errors are raised."""
    try:
        from transformers import logging
    except ImportError:  # named where it is used
        yield
        return
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    loggers = [standard_logging.getLogger(f"torch.{name}") for name in _REMARKING]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(standard_logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _countable() -> Iterator[None]:
    """torch counts a tensor's elements and bytes in 63 bits, and fake tensors hold no values."""
    try:
        yield
    except (RuntimeError, OverflowError) as error:
        if type(error).__name__ in _ASKS_FOR_VALUES:
            raise InputError(
                "dry_run: this model's code asks what its tensors hold, which no dry run knows; leave out --dry-run"
            ) from None
        if "overflow" not in str(error).lower():
            raise
        raise InputError(
            "dry_run: a tensor of this setup has 2^63 bytes or more; write a smaller --seq, --batch or model, or leave out --dry-run"
        ) from None


def check_dry_runnable(setup: Setup) -> None:
    """Raises InputError for what the dry run does not execute (``setup`` resolved)."""
    if resolve_model(setup.model).inferred:
        raise InputError(
            f"params: {setup.model} names no model code to run; write --model NAME, or leave out --dry-run"
        )
    known = {
        "method": ("full", "freeze", "lora", "dora", "qlora"),
        "optimizer": OPTIMIZERS,
        "precision": ("fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"),
        "loss": LOSSES,
        "checkpointing": ("none", "full", "selective"),
        "attention": ("eager", "sdpa", "flash", "flex"),
        "offload": (None, "activations", "optimizer", "optimizer+parameters"),
        "base_quantization": (None, *QUANTIZATIONS),
    }
    for name, values in known.items():
        value = getattr(setup, name)
        if value not in values:
            choices = ", ".join(str(choice) for choice in values if choice is not None) or "nothing"
            raise InputError(f"{name}: a dry run does not execute {value}; write {choices}, or leave out --dry-run")
    check_activations(setup)
    check_parallel(setup)
    check_libraries(setup)
