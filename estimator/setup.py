"""A training setup: one frozen record that estimate, plan, profile, train and validate all mean the same by.

Each field is a column of a table of measured runs and a flag of the command line; its metadata says what it is,
which values it takes and which framework default fills it in when it is ``None``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from estimator.errors import InputError

FRAMEWORKS = (
    "hf-trainer", "torch-loop", "hf-trainer+deepspeed", "torchtitan", "torchtune", "litgpt", "llm-foundry", "megatron",
    "megatron-deepspeed", "nemo", "mlperf", "axolotl", "unsloth", "internevo", "jax", "fms-fsdp", "hf-loop",
    "llm.c",
)  # fmt: skip
METHODS = ("full", "freeze", "lora", "dora", "qlora", "adapter", "adapter_v2")
QUANTIZATIONS = ("nf4", "nf4-dq", "int8", "gptq-int4", "gptq-int8")
PRECISIONS = ("fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed", "fp8-mixed", "mxfp8-mixed", "nvfp4-mixed")
OPTIMIZERS = ("adamw", "adamw-fused", "adamw-8bit", "adamw-paged", "adamw-8bit-paged", "adafactor", "sgd", "galore")
SHARDINGS = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp")
LOSSES = ("standard", "compiled", "chunked", "fused-kernel", "fused-linear", "cut-cross-entropy")

# What a framework does where the setup does not say. transformers >= 5: `adamw_torch_fused`, set_to_none,
# non-reentrant checkpointing; torch-loop is the procedure of the A+ rows of the evidence (foreach AdamW, zeroed gradients).
_FRAMEWORK_DEFAULTS: dict[str, dict[str, Any]] = {
    "hf-trainer": {"optimizer": "adamw-fused", "zero_grad": "none"},
    "torch-loop": {"optimizer": "adamw", "zero_grad": "none"},
}
_OTHER_FRAMEWORKS = {"optimizer": "adamw", "zero_grad": "none"}
# Of several data-parallel ranks; fsdp elsewhere. Megatron's recipes turn its distributed optimizer on.
_DEFAULT_SHARDING = dict.fromkeys(("megatron", "megatron-deepspeed", "nemo", "mlperf", "llm.c"), "zero1")


def _setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: int | None = None,
) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is trained, how, and on what. ``None`` means "the framework's default" (see ``resolved``) or "not used"."""

    model: str = field(
        metadata={
            "help": "A built-in or catalog name, a config.json, a directory, a hub id, or a parameter count.",
            "choices": None,
            "minimum": None,
        }
    )
    framework: str = _setting("hf-trainer", "Which training step is executed.", choices=FRAMEWORKS)
    accelerator: str | None = _setting(
        None, "The accelerator, by its name in the catalog (rtx-3090, h100-sxm-80gb, cpu)."
    )
    accelerators: int = _setting(1, "How many accelerators.", minimum=1)

    method: str = _setting("full", "What is trained.", choices=METHODS)
    lora_rank: int | None = _setting(None, "Rank of the LoRA adapters (16 where the method needs one).", minimum=1)
    lora_targets: str | None = _setting(None, "Modules that get adapters, space-separated, or all-linear.")
    trainable_layers: int | None = _setting(None, "With --method freeze: how many last layers train.", minimum=1)
    base_quantization: str | None = _setting(None, "How the frozen base is quantized.", choices=QUANTIZATIONS)

    precision: str = _setting(
        "bf16-mixed", "Weights and compute; -mixed is fp32 weights with autocast.", choices=PRECISIONS
    )
    autocast: str | None = _setting(None, "Autocast over half-precision weights.", choices=("bf16", "fp16"))
    optimizer: str | None = _setting(None, "The optimizer.", choices=OPTIMIZERS)
    optimizer_in_backward: bool = _setting(False, "Step each parameter in backward and drop its gradient at once.")
    zero_grad: str | None = _setting(
        None, "Gradients between steps: dropped (none) or zeroed.", choices=("none", "zero")
    )

    sharding: str | None = _setting(None, "What is sharded over the data-parallel ranks.", choices=SHARDINGS)
    shard_size: int | None = _setting(None, "Ranks that share one shard (hybrid sharding).", minimum=1)
    reshard_after_forward: bool = _setting(True, "FSDP frees gathered parameters between forward and backward.")
    flat_parameters: bool = _setting(
        False, "FSDP1: each unit is one flat parameter, and what belongs to no layer stays gathered."
    )
    data_parallel: int | None = _setting(None, "Data-parallel ranks.", minimum=1)
    tensor_parallel: int = _setting(1, "Tensor-parallel ranks.", minimum=1)
    pipeline_parallel: int = _setting(1, "Pipeline stages.", minimum=1)
    pipeline_schedule: str | None = _setting(
        None, "The pipeline's schedule.", choices=("1f1b", "gpipe", "interleaved-1f1b")
    )
    context_parallel: int = _setting(1, "Context-parallel ranks (the sequence is split).", minimum=1)
    expert_parallel: int = _setting(1, "Expert-parallel ranks.", minimum=1)
    gpus_per_node: int = _setting(8, "Accelerators in one machine.", minimum=1)
    internode_gbps: float | None = _setting(None, "Network of one accelerator to other machines, in Gbit/s.")
    offload: str | None = _setting(
        None, "What lives in host memory.", choices=("optimizer", "optimizer+parameters", "activations")
    )

    checkpointing: str = _setting("none", "Activation checkpointing.", choices=("none", "full", "selective"))
    checkpoint_reentrant: bool = _setting(False, "The reentrant variant of checkpointing.")
    attention: str = _setting("sdpa", "Attention implementation.", choices=("eager", "sdpa", "flash", "flex"))
    attention_kernel: str | None = _setting(
        None, "What SDPA picks, where known.", choices=("flash", "efficient", "cudnn", "math")
    )
    loss: str = _setting("standard", "The loss over the vocabulary.", choices=LOSSES)
    compile: bool = _setting(False, "torch.compile.")
    expandable_segments: bool = _setting(False, "The CUDA allocator's expandable segments.")

    seq: int = _setting(2048, "Tokens of a sequence.", minimum=1)
    batch: int = _setting(1, "Sequences of a micro-batch on each device.", minimum=1)
    accumulation: int = _setting(1, "Micro-batches of an optimizer step.", minimum=1)
    eval_batch: int | None = _setting(None, "Sequences of an evaluation batch; without it no evaluation.", minimum=1)
    logit_copies: str = _setting(
        "none",
        "What the loss copies of the logits before it upcasts or shifts them: none (transformers 4.50 and later), shifted "
        "(before 4.46), shifted-and-half (between).",
        choices=("none", "shifted", "shifted-and-half"),
    )
    varying_lengths: bool = _setting(
        False, "Batches are as long as their longest sequence, --seq at most: lengths vary from step to step."
    )
    pack: bool = _setting(True, "Sequences are packed to --seq tokens (--no-pack: padded).")

    def __post_init__(self) -> None:
        for spec in _limited():
            check_value(spec, getattr(self, spec.name))
        if self.method in ("lora", "dora", "qlora") and self.lora_rank is None:
            object.__setattr__(self, "lora_rank", 16)
        if self.method == "qlora" and self.base_quantization is None:
            object.__setattr__(self, "base_quantization", "nf4")
        if self.method == "freeze" and self.trainable_layers is None:
            raise InputError(
                "trainable_layers: --method freeze needs --trainable-layers N (how many last layers train)"
            )
        if self.method in ("full", "freeze"):
            for name in ("lora_rank", "lora_targets", "base_quantization"):
                if getattr(self, name):
                    raise InputError(f"{name}: means nothing with --method {self.method}; write --method lora or qlora")
        if self.attention_kernel and self.attention not in ("sdpa", self.attention_kernel):
            raise InputError(
                f"attention_kernel: {self.attention_kernel} is a choice of SDPA, which --attention {self.attention} does not "
                "call; write --attention sdpa, or leave --attention-kernel out"
            )
        if self.lora_targets is not None and not self.lora_targets.replace(",", " ").split():
            raise InputError(
                f"lora_targets: {self.lora_targets!r} names no module; write all-linear or for example 'q_proj v_proj'"
            )
        if self.method.startswith("adapter") and (self.framework != "litgpt" or self.lora_rank):
            raise InputError(
                f"method: {self.method} is litgpt's, without a rank; write --framework litgpt, or --method lora"
            )
        alone = self.accelerators == 1 or self.sharding == "ddp"
        if self.optimizer == "galore" and (self.framework, self.method, alone) != ("hf-trainer", "full", True):
            raise InputError(
                "optimizer: galore is Trainer's, of unsharded training in full; write --framework hf-trainer --method full "
                "(with several devices --sharding ddp), or another optimizer"
            )
        if self.accelerators % self.model_parallel:
            raise InputError(
                f"accelerators: {self.accelerators} is not a multiple of tensor x pipeline x context parallel ranks = "
                f"{self.model_parallel}; write --gpus {self.model_parallel} or a multiple"
            )
        data_parallel = self.accelerators // self.model_parallel
        if self.data_parallel not in (None, data_parallel):
            raise InputError(
                f"data_parallel: {self.data_parallel} x {self.model_parallel} model-parallel ranks is not "
                f"{self.accelerators} accelerators; write --data-parallel {data_parallel}"
            )

    @property
    def model_parallel(self) -> int:
        """Devices that hold one copy of the model: tensor x pipeline x context parallel ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def data_ranks(self) -> int:
        """Data-parallel ranks."""
        return self.accelerators // self.model_parallel

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all devices."""
        return self.seq * self.batch * self.accumulation * self.data_ranks

    def resolved(self) -> Setup:
        """The same setup with every framework default written out."""
        defaults = _FRAMEWORK_DEFAULTS.get(self.framework, _OTHER_FRAMEWORKS)
        filled = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        if self.sharding is None:
            # Context-parallel ranks are among those that frameworks shard over.
            alone = self.data_ranks * self.context_parallel == 1
            filled["sharding"] = "none" if alone else _DEFAULT_SHARDING.get(self.framework, "fsdp")
        if self.data_parallel is None:
            filled["data_parallel"] = self.data_ranks
        if self.pipeline_schedule is None:  # published runs interleave stages, which DeepSpeed's pipelines cannot
            filled["pipeline_schedule"] = "1f1b" if self.framework == "megatron-deepspeed" else "interleaved-1f1b"
        return dataclasses.replace(self, **filled)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Setup:
        """From a table's row, a TOML file or JSON: unknown names are an error, empty values mean the default."""
        types = setting_types()
        if unknown := sorted(set(values) - set(types)):
            raise InputError(f"{unknown[0]}: no such setting; the settings are {', '.join(types)}")
        given = {name: convert(name, value) for name, value in values.items() if value is not None and value != ""}
        if "model" not in given:
            raise InputError("model: write --model NAME or --params N")
        return cls(**given)

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name, in the order of declaration."""
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}


def setting_types() -> dict[str, type]:
    """The Python type of each setting's value (``None`` left out)."""
    names = {"str": str, "int": int, "float": float, "bool": bool}
    return {spec.name: names[str(spec.type).removesuffix(" | None")] for spec in fields(Setup)}


_KIND_NAMES = {int: "a whole number", float: "a number", str: "text"}


def convert(name: str, value: Any) -> Any:
    """One setting's value from text or a number, as the type that the setting has. Raises InputError."""
    kind = setting_types()[name]
    if kind is bool:
        if isinstance(value, bool):
            return value
        answer = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}.get(
            str(value).lower()
        )
        if answer is None:
            raise InputError(f"{name}: {value!r} is neither true nor false")
        return answer
    if isinstance(value, bool | list | tuple | dict):
        raise InputError(f"{name}: {value!r} is not {_KIND_NAMES[kind]}")
    if kind is str:
        return str(value)
    try:
        number = float(value)
        if kind is int and number != int(number):
            raise ValueError
        return kind(number)
    except (ValueError, OverflowError, TypeError):
        raise InputError(f"{name}: {value!r} is not {_KIND_NAMES[kind]}") from None


@functools.cache
def _limited() -> tuple[dataclasses.Field[Any], ...]:
    """The settings that have not every value of their type: a setup is made many times over."""
    return tuple(
        spec
        for spec in fields(Setup)
        if spec.metadata["choices"] or spec.metadata["minimum"] is not None or spec.name == "internode_gbps"
    )


_MOST = 10**12
"""Of every count: products of several stay far from where floating-point numbers end."""


def check_value(spec: dataclasses.Field[Any], value: Any) -> None:
    """Raises InputError where ``value`` is none that the setting ``spec`` may have."""
    if value is None:
        return
    choices, minimum = spec.metadata["choices"], spec.metadata["minimum"]
    if choices is not None and value in choices:
        return
    flag = "--" + spec.name.replace("_", "-")
    if choices is not None and value not in choices:
        raise InputError(f"{spec.name}: {value!r} is not known; write {flag} with one of {', '.join(choices)}")
    if minimum is not None and value < minimum:
        raise InputError(f"{spec.name}: {value} is too small; write {flag} {minimum} or more")
    if minimum is not None and value > _MOST:
        raise InputError(f"{spec.name}: {value:.3g} is too large; write {flag} {_MOST} or less")
    if spec.name == "internode_gbps" and not 1e-3 <= value <= 1e9:
        raise InputError(f"{spec.name}: {value} is out of range; write {flag} with Gbit/s, 0.001 to 1e9")
