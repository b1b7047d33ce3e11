"""What a plan may choose from: every setting that was not given, with the values worth trying."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from estimator.errors import InputError
from estimator.hardware import accelerators, find_accelerator
from estimator.run.prices import catalog_price
from estimator.setup import Setup, check_value, convert
from estimator.speed.compute import MEGATRON

MOST_ACCELERATORS = 512
"""The largest count that is tried where none is given."""
FINE_TUNE_TOKENS_PER_STEP, PRETRAINING_TOKENS_PER_STEP = 2**17, 2**22
"""Tokens of an optimizer step where no global batch is given; published fine-tunes and pretrainings, roughly."""
PRETRAINING_TOKENS = 10**11
"""From here on a run is no fine-tune."""
_DEVICES_PER_SEQUENCE = 8
"""At most, of the assumed global batch: Llama 3 405B had 2,048 sequences on 16,384."""

NUMBERS = (
    "accelerators", "tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel", "batch", "accumulation",
)  # fmt: skip
"""Settings that are searched as arrays; the rest is combined one by one."""
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_STAGES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
_LONG_SEQUENCE = 16_384
"""From here on sequences are worth splitting over devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The settings that were given, each with its allowed values (converted, not empty); the others are searched."""

    given: Mapping[str, tuple[Any, ...]]
    global_batch: int | None = None
    """Sequences of an optimizer step over all devices; ``None``: chosen from the run's tokens."""
    most_accelerators: int | None = None
    """Where no counts were given."""
    owned: bool = False
    """Accelerators need no price."""

    @classmethod
    def of(cls, given: Mapping[str, Sequence[Any]], **rest: Any) -> Space:
        """From texts or values by the names of settings. Raises InputError."""
        values = {name: tuple(dict.fromkeys(convert(name, value) for value in some)) for name, some in given.items()}
        if not values.get("model"):
            raise InputError("model: write --model NAME or --params N")
        if len(values["model"]) > 1 or len(values.get("seq", ())) > 1:
            many = "model" if len(values["model"]) > 1 else "seq"
            raise InputError(f"{many}: a plan is for one {many}; give one value")
        if "accelerator" in values:
            values["accelerator"] = tuple(find_accelerator(name).name for name in values["accelerator"])
        for spec in fields(Setup):  # each value alone, so that a bad one is named before the search
            for value in values.get(spec.name, ()):
                check_value(spec, value)
        space = cls(given=values, **rest)
        most = max(values.get("accelerators", (0,)))
        if space.most_accelerators is not None and most > space.most_accelerators:
            raise InputError(f"max_gpus: {space.most_accelerators} are fewer than --gpus {most}; give one of the two")
        return space

    @property
    def seq(self) -> int:
        return int(self.given.get("seq", (_default("seq"),))[0])

    def sequences_per_step(self, tokens: int | None) -> int | None:
        """The global batch; ``None`` where the batch and the accumulation that were given decide it."""
        if self.global_batch is not None:
            return self.global_batch
        if "accumulation" in self.given:
            return None
        wanted = PRETRAINING_TOKENS_PER_STEP if (tokens or 0) >= PRETRAINING_TOKENS else FINE_TUNE_TOKENS_PER_STEP
        # Enough for pipelines of the devices that were given to be filled.
        sequences = max(wanted / self.seq, min(self.given.get("accelerators", (1,))) / _DEVICES_PER_SEQUENCE)
        odd = self._odd_part()
        return int(odd << max(0, (round(sequences) // odd).bit_length() - 1))

    def _odd_part(self) -> int:
        """What a global batch must divide by so that the counts and batches that were given can make it, twos apart."""
        common = math.lcm(1, *self.given.get("accelerators", ()), *self.given.get("batch", ()))
        return common // (common & -common)

    def accelerator_names(self) -> tuple[str, ...]:
        """Those that were given; else all that have a rate, a known memory and (unless owned) a price."""
        if "accelerator" in self.given:
            return tuple(self.given["accelerator"])
        return tuple(
            device.name
            for device in accelerators().values()
            if device.usable_bytes is not None
            and any(device.matrix_flops(precision) for precision in self._values("precision"))
            and (self.owned or catalog_price(device.name) is not None)
        )

    def bases(self) -> Iterator[Setup]:
        """Every combination of what is not a number, as a setup of one device; contradictions are left out."""
        axes = {name: self._values(name) for name in _categories()}
        seen = set()
        for point in itertools.product(*axes.values()):
            settings = _of_its_method(dict(zip(axes, point, strict=True)))
            key = tuple(settings.items())
            if key in seen or not self._sensible(settings):
                continue
            seen.add(key)
            yield Setup(**settings).resolved()

    def _sensible(self, settings: Mapping[str, Any]) -> bool:
        """Whether somebody would run it: of what was not asked for, only what the framework has and what has a use."""
        framework, sharding, offload = settings["framework"], settings["sharding"], settings["offload"]
        if framework.startswith("hf-trainer") and settings["checkpointing"] == "selective":
            return False
        if framework == "torchtitan" and sharding == "ddp":
            return False
        if "framework" not in self.given:
            if framework == "torchtitan" and settings["method"] in ("freeze", "dora", "qlora"):
                return False
            if framework == "hf-trainer+deepspeed" and not offload:
                return False
        if "sharding" not in self.given and not _has_sharding(framework, sharding):
            return False
        if "offload" in self.given or offload is None:
            return True
        if framework == "torchtitan" and "framework" not in self.given:  # as Trainer's FSDP, which has it as well
            return False
        # FSDP puts parameters on the host with the optimizer; ZeRO-2 the optimizer alone, and ZeRO-3 needs no half measure.
        # Adapters have no optimizer worth moving, and quantized weights stay.
        moved = {"fsdp": "optimizer+parameters", "zero2": "optimizer", "zero3": "optimizer+parameters"}.get(sharding)
        return bool(offload == moved and settings["method"] in ("full", "freeze"))

    def numbers(self, base: Setup, *, experts: bool) -> dict[str, tuple[int, ...]]:
        """The values of each of ``NUMBERS`` for one of the ``bases``; accumulation only where it was given."""
        most = self.most_accelerators or MOST_ACCELERATORS
        searched = {
            "accelerators": tuple(2**power for power in range(most.bit_length()) if 2**power <= most),
            "tensor_parallel": (1, 2, 4, 8),
            "pipeline_parallel": self._stages(),
            "context_parallel": (1, 2, 4, 8) if self.seq >= _LONG_SEQUENCE else (1,),
            "expert_parallel": (1, 8) if experts else (1,),
            "batch": _BATCHES,
        }
        if base.framework.startswith("hf-trainer"):  # Trainer splits the model by sharding alone
            searched |= dict.fromkeys(
                ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel"), (1,)
            )
        if base.offload and base.sharding != "fsdp" and "framework" not in self.given:  # several devices have FSDP
            searched["accelerators"] = (1,)
        return searched | {name: self.given[name] for name in NUMBERS if name in self.given}

    def _stages(self) -> tuple[int, ...]:
        """Pipeline stages; those that divide the counts that were given."""
        counts = self.given.get("accelerators", (16,))
        return tuple(stages for stages in _STAGES if any(count % stages == 0 for count in counts))

    def _values(self, name: str) -> tuple[Any, ...]:
        if name == "accelerator":
            return self.accelerator_names()
        if name in self.given:
            return self.given[name]
        if name in _SEARCHED:
            return self._searched(name)
        return (_default(name),)

    def _searched(self, name: str) -> tuple[Any, ...]:
        alone = self.given.get("accelerators", (2,)) == (1,)
        return _ALONE.get(name, _SEARCHED[name]) if alone else _SEARCHED[name]


# What changes how a model is trained but not what comes out. Methods, precisions and optimizers are searched only where
# several are given.
_SEARCHED: dict[str, tuple[Any, ...]] = {
    "framework": ("hf-trainer", "torchtitan", "hf-trainer+deepspeed"),
    "sharding": ("none", "ddp", "fsdp", "zero1", "zero2", "zero3"),
    "checkpointing": ("none", "selective", "full"),
    "offload": (None, "optimizer", "optimizer+parameters"),
}
# Of one device: DeepSpeed's stages shard nothing there, and put on the host what the device cannot hold.
_ALONE: dict[str, tuple[Any, ...]] = {
    "framework": ("hf-trainer", "hf-trainer+deepspeed"),
    "sharding": ("none", "zero2", "zero3"),
}


def _has_sharding(framework: str, sharding: str) -> bool:
    """Whether a framework's own sharding is such a one: DeepSpeed's stages, Megatron's distributed optimizer, or PyTorch's."""
    if framework == "hf-trainer+deepspeed":
        return sharding in ("zero2", "zero3")
    if framework in MEGATRON:
        return sharding in ("none", "ddp", "zero1", "fsdp")
    return sharding in ("none", "ddp", "fsdp")


def _categories() -> list[str]:
    return [spec.name for spec in fields(Setup) if spec.name not in (*NUMBERS, "data_parallel")]


def _of_its_method(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what only other methods have, so that one search can compare methods."""
    adapters = settings["method"] in ("lora", "dora", "qlora")
    foreign = {
        "lora_rank": not adapters,
        "lora_targets": not adapters,
        "base_quantization": settings["method"] != "qlora",
        "trainable_layers": settings["method"] != "freeze",
    }
    return settings | {name: None for name, is_foreign in foreign.items() if is_foreign}


def _default(name: str) -> Any:
    return next(spec.default for spec in fields(Setup) if spec.name == name)
