"""A measured run: one row of the table that ``profile`` writes and that ``fit`` and ``validate`` read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from estimator.errors import InputError
from estimator.setup import Setup, setting_types

OUTCOMES = ("ok", "oom", "failed", "timeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """A setup and what happened. Bytes and seconds are per device; ``None`` is "not measured" or "not stated"."""

    run: str
    """Identifies the row; for rows that ``profile`` writes, the key of the setup, the repeat and the machine."""
    setup: Setup
    source: str = ""
    """Who measured it; the text before the first colon groups the scores."""
    grade: str = ""
    """A+ (every setting known, bytes exact), A, B, C, or empty."""
    outcome: str = "ok"
    reason: str | None = None
    """Why a run is not ``ok``, in one line."""

    parameters: int | None = None
    trainable_parameters: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_device_bytes: int | None = None
    peak_unstated_bytes: int | None = None
    """A published peak whose kind the source does not say."""
    peak_host_bytes: int | None = None
    peak_phase: str | None = None
    """The phase that held the allocated peak: forward, backward, optimizer or evaluation."""
    peak_forward_bytes: int | None = None
    peak_backward_bytes: int | None = None
    peak_optimizer_bytes: int | None = None
    loaded_bytes: int | None = None
    """Allocated once the model is loaded, before the first step."""

    step_seconds: float | None = None
    """Median over the timed steps."""
    step_seconds_spread: float | None = None
    """Half the distance between the 5th and 95th percentile of the timed steps, over the median."""
    timed_steps: int | None = None
    tokens_per_second_per_accelerator: float | None = None
    model_tflops_per_accelerator: float | None = None
    stated_mfu: float | None = None
    energy_joules: float | None = None
    """Of one optimizer step."""

    checkpoint_bytes: int | None = None
    checkpoint_model_bytes: int | None = None
    checkpoint_optimizer_bytes: int | None = None
    checkpoint_seconds: float | None = None

    final_loss: float | None = None
    global_batch: int | None = None
    kernels: str | None = None
    torch: str | None = None
    transformers: str | None = None
    environment: str | None = None
    """JSON: libraries, device, host, clocks."""
    notes: str | None = None

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise InputError(f"outcome: {self.outcome!r} is not known; it is one of {', '.join(OUTCOMES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A row of a table that is not used, and why, in one line."""

    run: str
    reason: str


_TYPES = {"str": str, "int": int, "float": float}
MEASUREMENTS: dict[str, type] = {
    spec.name: _TYPES[str(spec.type).removesuffix(" | None")] for spec in fields(MeasuredRun) if spec.name != "setup"
}
"""The columns that are not settings, with their types, in the table's order."""


def columns() -> list[str]:
    """The columns of a table of measured runs, in order: identity, settings, measurements."""
    identity = ["run", "source", "grade"]
    return identity + list(setting_types()) + [name for name in MEASUREMENTS if name not in identity]


def to_row(run: MeasuredRun) -> dict[str, Any]:
    """One flat record by column name."""
    values = {name: getattr(run, name) for name in MEASUREMENTS} | run.setup.as_dict()
    return {name: values[name] for name in columns()}


def from_row(row: Mapping[str, Any]) -> MeasuredRun:
    """A measured run from one flat record; empty text, ``None`` and NaN are "not stated".

    Columns that are unknown are ignored (tables may hold more). Raises InputError naming the run and the column.
    """
    settings: dict[str, Any] = {}
    measurements: dict[str, Any] = {}
    stated = {name: value for name, value in row.items() if not _is_empty(value)}
    if "lora_targets" in stated:
        stated["lora_targets"] = _plain_targets(str(stated["lora_targets"]))
    if " or " in str(stated.get("attention_kernel", "")):  # "flash or efficient": the source does not know either
        del stated["attention_kernel"]
    if "base_quantization" in stated:
        stated["base_quantization"] = _QUANTIZATIONS.get(stated["base_quantization"], stated["base_quantization"])
    stated |= _as_sourced(stated)
    version = re.match(r"(\d+)\.(\d+)", str(stated.get("transformers", "")))
    if version:
        stated.setdefault("logit_copies", _logit_copies(int(version[1]), int(version[2])))
    framework = str(stated.get("framework"))
    recipes = "automodel" if _checkpoints_in_automodel(stated) else framework
    for name, value in _UNSTATED.get(recipes, {}).items():
        stated.setdefault(name, value)
    traced = re.search(r"graph_trainer|compiler toolkit", str(stated.get("notes", "")))
    if stated.get("framework") == "torchtitan" and str(stated.get("compile", "")).lower() == "true" and not traced:
        stated.setdefault("loss", "compiled")  # `compile.components` holds the loss as well
    if version is None or int(version[1]) < 5:
        _before_transformers_5(stated)
    stated |= _noted(str(stated.get("notes", "")))
    stated |= _as_loaded(stated)
    if "accelerators" not in stated and "expert_parallel" in stated:  # at least as many as the experts are over
        stated["accelerators"] = stated["expert_parallel"]
    label = str(stated.get("run", "?"))
    try:
        if "run" not in stated:
            raise InputError("run: the column is missing or empty")
        for name, value in stated.items():
            if name in MEASUREMENTS:
                measurements[name] = _convert(name, value)
            elif name in setting_types():
                settings[name] = value
        return MeasuredRun(setup=Setup.from_mapping(settings), **measurements)
    except InputError as error:
        raise InputError(f"run {label}: {error}") from None


def with_measurements(run: MeasuredRun, **values: Any) -> MeasuredRun:
    """A copy with some columns replaced."""
    return dataclasses.replace(run, **values)


def _plain_targets(text: str) -> str | None:
    """Module names as published tables write them: ``c_attn (DEFAULT)``, ``q_proj +MLP (flag)``, ``all linear``."""
    plain = re.sub(r"\([^)]*\)", " ", text).replace("+", " ").replace("all linear", "all-linear")
    names = [name.lower() if name == "MLP" else name for name in plain.split() if name != "DEFAULT"]
    return " ".join(names) or None


def _as_sourced(stated: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's source or notes name and its columns have wrong: litgpt's configurations say ``gemma2-2b``, which is not
    ``gemma-2b``, and torchtitan was run for another project's page."""
    named: dict[str, Any] = {}
    if config := re.search(r"config_hub/finetune/gemma2-(\d+b)/", str(stated.get("source", ""))):
        named["model"] = f"gemma-2-{config[1]}"
    if re.search(r"(^|; )torchtitan \w+ 20\d\d, command", str(stated.get("notes", ""))):
        named["framework"] = "torchtitan"
    return named


def _checkpoints_in_automodel(stated: Mapping[str, Any]) -> bool:
    """NeMo with FSDP is Automodel, whose benchmark recipes checkpoint (54 of 66), but on one device and for small mixtures
    (examples/llm_benchmark: llama3_1_8b_peft, qwen2_5_7b_peft, gptoss_20b, moonlight_16b)."""
    small = str(stated.get("model")).startswith(("gpt-oss-20b", "moonlight-16b"))
    automodel = stated.get("framework") == "nemo" and stated.get("sharding") == "fsdp"
    return automodel and not small and str(stated.get("accelerators")).removesuffix(".0") != "1"


_UNSTATED: dict[str, dict[str, str]] = {
    "torchtitan": {"checkpointing": "selective"},
    "torchtune": {"checkpointing": "full"},
    "llm-foundry": {"loss": "fused-kernel"},
    "automodel": {"checkpointing": "full"},
}
"""What a framework's own recipes do where a table says nothing, and a setup's default is another."""
_QUANTIZATIONS = {"int4": "nf4-dq"}
"""What published tables call a quantization: bitsandbytes' four bits, with the frameworks' defaults."""

_NOTES: tuple[tuple[str, str, Any], ...] = (
    (r"default allocator", "expandable_segments", False),
    (r"activation offloading=True", "offload", "activations"),
    (r"reshard_after_forward=never", "reshard_after_forward", False),
    (r"optimizer_in_bwd(?!=)", "optimizer_in_backward", True),
    (r"^(?!.*empty_cache).*(truncated to max_length|padded to longest)", "varying_lengths", True),
)
"""Settings that published tables put into words: what a note says (a regular expression) goes before the columns."""


def _logit_copies(major: int, minor: int) -> str:
    """What a version of transformers does: from 4.46 its losses are functions, which hold the half logits that they upcast;
    from 4.50 on they shift the labels and no longer the logits."""
    if (major, minor) < (4, 46):
        return "shifted"
    return "shifted-and-half" if (major, minor) < (4, 50) else "none"


def _before_transformers_5(stated: dict[str, Any]) -> None:
    """Trainer's FSDP was FSDP1, and its checkpointing reentrant; TRL's loops and peft's examples are Trainers (``hf-loop``)."""
    if stated.get("framework", "hf-trainer") not in ("hf-trainer", "hf-loop"):
        return
    if stated.get("sharding") == "fsdp":
        stated.setdefault("flat_parameters", True)
    if stated.get("checkpointing") == "full":
        stated.setdefault("checkpoint_reentrant", True)


def _noted(notes: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: value for pattern, name, value in _NOTES if re.search(pattern, notes)}
    experts = re.search(r"scattermoe[\w-]*-ep(\d+)", notes)
    return found | ({"expert_parallel": int(experts[1])} if experts else {})


def _as_loaded(stated: Mapping[str, Any]) -> dict[str, Any]:
    """How fms-acceleration loads a bitsandbytes base, which its tables leave out: always with double quantization
    (``framework_plugin_bnb.py``). Without its own preparation ("baseline") TRL widens what is not quantized, unless the
    base is sharded (``SFTTrainer``, ``is_sharded_qlora``): norms are then fp32, and with them all that follows."""
    config = re.search(r"framework_config=([\w-]*)peft-bnb", str(stated.get("notes", "")))
    if config is None:
        return {}
    widened = config[1] == "baseline-" and float(stated.get("accelerators", 1)) == 1
    return {"base_quantization": "nf4-dq"} | ({"precision": "bf16-mixed"} if widened else {})


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value)) or str(value) == "<NA>"


def _convert(name: str, value: Any) -> Any:
    kind = MEASUREMENTS[name]
    if kind is str:
        return str(value)
    try:
        number = float(value)
        if not math.isfinite(number) or (number < 0 and name != "final_loss"):
            raise ValueError
        # Neither a table's column nor an array that the laws are fitted to holds a whole number of more than 64 bits.
        if kind is int and number >= 2**63:
            raise ValueError
        return kind(number)
    except (TypeError, ValueError):
        raise InputError(
            f"{name}: {value!r} is not a non-negative number{' below 2^63' if kind is int else ''}"
        ) from None
