"""Changes of a setup that lower its memory: what each sets, and what it alters besides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from estimator.hardware import is_cpu
from estimator.setup import Setup

_FLAGS = {"accelerator": "gpu", "accelerators": "gpus", "base_quantization": "quantization"}
# Frameworks that take a transformers model, and with it these libraries' losses and optimizers.
_TRANSFORMERS = ("hf-trainer", "hf-loop", "torch-loop", "hf-trainer+deepspeed", "axolotl", "unsloth", "fms-fsdp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """New values of settings."""

    settings: dict[str, Any]
    note: str = ""
    """What it alters of the training; empty where that does the same arithmetic on the same tokens."""
    hidden: tuple[str, ...] = ()
    """Settings that go along without a flag."""

    def then(self, other: Change) -> Change:
        """Both."""
        return Change(
            settings=self.settings | other.settings,
            note="; ".join(note for note in (self.note, other.note) if note),
            hidden=self.hidden + other.hidden,
        )

    @property
    def flags(self) -> str:
        """As one writes it: ``--checkpointing full``."""
        return " ".join(_flag(name, value) for name, value in self.settings.items() if name not in self.hidden)


def _flag(name: str, value: Any) -> str:
    flag = "--" + _FLAGS.get(name, name).replace("_", "-")
    if value is True:
        return flag
    return f"{flag} {value.lower() if name == 'accelerator' else value}"


def ladders(setup: Setup) -> Iterator[list[Change]]:
    """Every kind of change that is not made yet, each as ever stronger steps of it."""
    yield from _same_result(setup)
    yield from _other_optimizer(setup)
    yield from _other_training(setup)


def _same_result(setup: Setup) -> Iterator[list[Change]]:
    stronger = {"none": ("selective", "full"), "selective": ("full",), "full": ()}[setup.checkpointing]
    for kind in stronger:
        if kind == "full" or setup.framework not in _TRANSFORMERS:  # transformers checkpoints whole layers only
            yield [Change(settings={"checkpointing": kind})]
    # The same tokens in every step, of fewer sequences at once.
    parts = dict.fromkeys(
        [*(setup.batch // n for n in range(2, 65) if setup.batch % n == 0), 1] if setup.batch > 1 else []
    )
    yield [Change(settings={"batch": b, "accumulation": setup.accumulation * (setup.batch // b)}) for b in parts]
    if setup.eval_batch and setup.eval_batch > 1:
        yield [Change(settings={"eval_batch": b}) for b in _halves(setup.eval_batch)]
    if setup.attention == "eager":
        yield [Change(settings={"attention": "sdpa"})]
    if setup.loss in ("standard", "compiled", "fused-kernel") and setup.framework in _TRANSFORMERS:
        yield [Change(settings={"loss": "fused-linear"})]
    if setup.optimizer == "adamw":
        yield [Change(settings={"optimizer": "adamw-fused"})]
    if setup.zero_grad == "zero":
        yield [Change(settings={"zero_grad": "none"})]
    if not setup.expandable_segments and not is_cpu(setup.accelerator) and setup.framework != "jax":
        yield [Change(settings={"expandable_segments": True})]
    ranks = setup.data_ranks * setup.context_parallel
    if ranks > 1 and setup.sharding in ("none", "ddp"):
        yield [Change(settings={"sharding": "fsdp"})]
    if ranks > 1 and setup.sharding in ("zero1", "zero2"):
        yield [Change(settings={"sharding": "zero3"})]
    if setup.sharding == "fsdp" and not setup.reshard_after_forward:
        yield [Change(settings={"reshard_after_forward": True})]


def _other_optimizer(setup: Setup) -> Iterator[list[Change]]:
    torch = setup.optimizer in ("adamw", "adamw-fused")
    if torch and setup.framework in (*_TRANSFORMERS, "torchtune") and not is_cpu(setup.accelerator):
        yield [Change(settings={"optimizer": "adamw-8bit"}, note="rounds the optimizer's states to 8 bits")]
        yield [Change(settings={"optimizer": "adamw-paged"})]
    if setup.optimizer in ("adamw", "adamw-fused", "adamw-8bit") and setup.framework in _TRANSFORMERS:
        yield [Change(settings={"optimizer": "adafactor"}, note="another optimizer")]
    if not setup.optimizer_in_backward and setup.accumulation == 1 and setup.framework in ("torch-loop", "torchtune"):
        yield [Change(settings={"optimizer_in_backward": True}, note="no gradient clipping")]
    if setup.offload is None and str(setup.sharding).startswith("zero"):
        yield [Change(settings={"offload": "optimizer"})]


def _other_training(setup: Setup) -> Iterator[list[Change]]:
    lower = {"fp32": "bf16", "bf16-mixed": "bf16", "fp16-mixed": "bf16"}
    if setup.precision in lower and setup.framework in (*_TRANSFORMERS, "torchtune", "litgpt", "torchtitan"):
        yield [Change(settings={"precision": lower[setup.precision]}, note="weights and states in bf16")]
    base: dict[str, Any] = {"trainable_layers": None} if setup.trainable_layers else {}
    if setup.framework in (*_TRANSFORMERS, "torchtune", "litgpt"):
        if setup.method in ("full", "freeze"):
            yield [Change(settings={"method": "lora"} | base, hidden=tuple(base), note="trains adapters only")]
        if setup.method in ("full", "freeze", "lora") and not setup.base_quantization and not is_cpu(setup.accelerator):
            note = "a base in 4 bits" if setup.method == "lora" else "trains adapters only, on a base in 4 bits"
            quantized = {"method": "qlora", "base_quantization": "nf4"} | base
            yield [Change(settings=quantized, hidden=(*base, "base_quantization"), note=note)]
    yield [
        Change(settings={"seq": seq, "accumulation": setup.accumulation * (setup.seq // seq)}, note="shorter sequences")
        for seq in _halves(setup.seq)[:2]
    ]


def _halves(value: int) -> list[int]:
    """``value`` halved again and again, as long as it is even."""
    found = []
    while value % 2 == 0 and value > 1:
        value //= 2
        found.append(value)
    return found
