"""The step law: seconds of a step from its work, the hardware's rates and a few fitted coefficients.

Physics gives the form; each kind of work takes a multiple of what the datasheet promises. The multiples, and how
frameworks, precisions and architectures differ in them, are fitted to published runs (``benchmarks/fit_step_law.py``,
``make laws``) and stored with their standard errors in ``data/step_law.json``. A level that the fit has not seen keeps
the general coefficient, and the interval is wider.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from estimator.arrays import Number, is_plain, maximum, where
from estimator.hardware import Accelerator
from estimator.model.catalog import listed_name
from estimator.model.shape import ModelShape
from estimator.result import Part
from estimator.setup import Setup
from estimator.speed.compute import StepWork, is_megatron, step_work
from estimator.speed.rates import Rates, rates
from estimator.speed.traffic import OWN_KERNELS
from estimator.units import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficient:
    """A multiple of the seconds that the datasheet's rates give (or, where ``unit`` says so, seconds)."""

    name: str
    prior: float
    width: float
    """Standard deviation of the prior, in factors e."""
    meaning: str


COEFFICIENTS = tuple(
    Coefficient(name=name, prior=prior, width=width, meaning=meaning)
    for name, prior, width, meaning in (
        ("matmul", 1.35, 0.15, "x FLOPs / peak of the precision"),
        ("expert", 1.0, 0.5, "of routed experts, x the same and x matmul's"),
        ("head", 1.35, 0.25, "x FLOPs / peak of bf16"),
        ("attention", 2.2, 0.3, "x FLOPs that the kernel computes / peak of bf16"),
        ("scan", 4.0, 0.7, "x FLOPs of the chunks / peak of bf16, and bytes / bandwidth"),
        ("operands", 0.75, 0.5, "x bytes of inputs, weights and outputs / bandwidth"),
        ("casts", 1.25, 0.5, "x bytes / bandwidth"),
        ("elementwise", 1.25, 0.5, "x bytes / bandwidth"),
        ("adapters", 1.25, 0.5, "x bytes / bandwidth"),
        ("scores", 1.25, 0.5, "x bytes / bandwidth"),
        ("logits", 1.35, 0.5, "x bytes / bandwidth"),
        ("dequantize", 2.0, 0.6, "x bytes / bandwidth"),
        ("optimizer", 1.35, 0.4, "x bytes / bandwidth"),
        ("launches", 6e-6, 0.6, "seconds a kernel"),
        ("tensor", 0.85, 0.7, "x bytes / link: below 1 what overlaps"),
        ("context", 0.85, 0.7, "x bytes / link"),
        ("routing", 2.0, 0.7, "x bytes / link"),
        ("pipeline", 0.3, 0.7, "x bytes / link"),
        ("gathered", 1.4, 0.7, "x bytes / link"),
        ("reduced", 1.4, 0.7, "x bytes / link"),
        ("bubble", 0.5, 0.7, "x (stages - 1) / micro-batches, where stages are interleaved: below 1 what that hides"),
        ("offload", 1.65, 0.5, "x bytes / PCIe"),
        ("host", 5e-11, 0.5, "seconds a byte of an optimizer in host memory"),
        ("step", 2e-3, 1.0, "seconds a step: data, schedule, logging"),
        ("total", 1.0, 1e-6, "x all of it"),
    )
)

_LAUNCH_POWER, _OVERLAP_POWER = 4.0, 2.0
"""Of work that overlaps, (a^p + b^p)^(1/p): launches hide behind the device's work until they exceed it, collectives
overlap less neatly."""


HYBRID = ("layers", "hybrid")
"""What hybrids have of their own in each kind of work: which of their products stay in half precision, how their layers are
fused and captured is in no column. It also keeps their rows from bending what transformers share."""
_OF_HYBRIDS = ("matmul", "expert", "operands", "casts", "elementwise", "launches", "routing")


def levels(
    setup: Setup, accelerator: Accelerator, *, megatron: bool, hybrid: bool = False
) -> dict[str, tuple[tuple[str, str], ...]]:
    """By coefficient the (factor, level) pairs that may shift it."""
    found = _levels(setup, accelerator, megatron=megatron)
    return found | {name: (*found.get(name, ()), HYBRID) for name in _OF_HYBRIDS} if hybrid else found


def _levels(setup: Setup, accelerator: Accelerator, *, megatron: bool) -> dict[str, tuple[tuple[str, str], ...]]:
    framework = "megatron" if megatron and setup.framework.startswith(("hf", "torch-loop")) else setup.framework
    # NeMo trains with Megatron's engine, and with FSDP through another (AutoModel).
    if framework == "nemo" and setup.sharding == "fsdp":
        framework = "nemo fsdp"
    kind = setup.precision.partition("-")[0]
    architecture = accelerator.architecture.split()[0]
    kernel = setup.attention_kernel or setup.attention
    own = setup.framework in OWN_KERNELS  # fused as a compiler would
    compiled = "compiled" if setup.compile or own else "eager"
    # Written for one model and one vendor's kernels, or for all that PyTorch runs.
    engine = ("engine", "megatron" if megatron or own else "torch")
    # A fused loss comes with fused norms and rotations (Liger, fms-acceleration's kernels); a chunked one alone.
    kernels = "fused" if setup.loss.startswith("fused") else "separate"
    # What Megatron-Bridge's table calls ddp are mostly its older releases: their effect, not that of the sharding.
    sharding = ("framework and sharding", f"{framework} {setup.sharding}")
    return {
        "matmul": (("precision", kind), ("architecture", architecture), ("framework", framework),
                   ("precision and architecture", f"{kind} {architecture}")),
        "expert": (("framework", framework), ("architecture", architecture), sharding),
        "attention": (("architecture", architecture), ("kernel", kernel),
                      ("framework and architecture", f"{framework} {architecture}")),
        "elementwise": (
            engine,
            ("framework", framework),
            ("compile", compiled),
            ("kernels", kernels),
        ),
        "logits": (("loss", setup.loss),),
        "dequantize": (("quantization", setup.base_quantization or "none"),),
        "optimizer": (("framework", framework),),
        "launches": (("framework", framework), ("compile", compiled)),
        "routing": (("architecture", architecture),),
        "gathered": (("framework", framework), ("architecture", architecture)),
        "bubble": (("framework", framework),),
        "total": (
            ("framework", framework),
            ("accelerator", accelerator.name),
            ("framework and accelerator", f"{framework} {accelerator.name}"),
            engine,
            sharding,
            ("model", listed_name(setup.model)),
        ),
    }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLaw:
    """The fitted coefficients."""

    coefficients: Mapping[str, float]
    effects: Mapping[str, Mapping[str, Mapping[str, float]]]
    """By coefficient, factor and level: what is added to the coefficient's logarithm."""
    half_widths: Mapping[str, Mapping[str, float]]
    """Of the 90% interval, in factors e, for dense models and mixtures of experts: by framework where the fit has seen
    all of a setup, and by what it has not seen."""
    models: frozenset[tuple[int, int, int]]
    """The ``layout`` of every model that the fit has seen."""


@functools.cache
def fitted_law() -> StepLaw:
    """The law that ``make laws`` stored."""
    stored: dict[str, Any] = json.loads((resources.files("estimator.data") / "step_law.json").read_text("utf-8"))
    return StepLaw(
        coefficients={name: entry["value"] for name, entry in stored["coefficients"].items()},
        effects={
            name: {factor: {level: shift[0] for level, shift in shifts.items()} for factor, shifts in factors.items()}
            for name, factors in stored["effects"].items()
        },
        half_widths=stored["half_widths"],
        models=frozenset((layers, hidden, ffn) for layers, hidden, ffn in stored["models"]),
    )


def multipliers(law: StepLaw, setup: Setup, accelerator: Accelerator, *, hybrid: bool = False) -> dict[str, Number]:
    """Each coefficient as it is for a setup: the general one times its levels' effects."""
    megatron = is_megatron(setup)
    if is_plain(megatron):
        return _multipliers(law, levels(setup, accelerator, megatron=bool(megatron), hybrid=hybrid))
    yes, no = (
        _multipliers(law, levels(setup, accelerator, megatron=answer, hybrid=hybrid)) for answer in (True, False)
    )
    return {name: where(megatron, yes[name], no[name]) for name in yes}


def _multipliers(law: StepLaw, of: Mapping[str, tuple[tuple[str, str], ...]]) -> dict[str, Number]:
    found = {}
    for name, value in law.coefficients.items():
        effects = law.effects.get(name, {})
        found[name] = value * math.exp(
            sum(effects.get(factor, {}).get(level, 0.0) for factor, level in of.get(name, ()))
        )
    return found


def seconds_by_kind(work: StepWork, at: Rates, by: Mapping[str, Number]) -> dict[str, Number]:
    """Seconds of each kind of work, those that overlap counted by what shows; they sum to the step."""
    memory = at.bandwidth
    device = {
        "matrix products": (work.matmul_flops + (by["expert"] - 1.0) * work.expert_flops) / at.flops * by["matmul"]
        + work.operand_bytes / memory * by["operands"],
        "casts": work.cast_bytes / memory * by["casts"],
        "head": work.head_flops / at.half_flops * by["head"],
        "attention": work.kernel_attention_flops / at.half_flops * by["attention"]
        + work.scores_bytes / memory * by["scores"],
        "scans": (work.scan_flops / at.half_flops + work.scan_bytes / memory) * by["scan"],
        "elementwise": (work.elementwise_bytes - work.adapter_bytes) / memory * by["elementwise"],
        "adapters": work.adapter_bytes / memory * by["adapters"],
        "logits": work.logits_bytes / memory * by["logits"],
        "dequantization": work.dequantize_bytes / memory * by["dequantize"],
        "tensor parallelism": work.tensor_bytes * at.tensor * by["tensor"],
        "context parallelism": work.context_bytes * at.context * by["context"],
        "expert parallelism": work.expert_bytes * at.expert * by["routing"],
        "pipeline transfers": work.pipeline_bytes * at.pipeline * by["pipeline"],
    }
    busy: Number = sum(device.values())
    passes = _overlapped(busy, work.launches * by["launches"], _LAUNCH_POWER)
    bubble = passes * (work.bubble * by["bubble"] + work.whole_bubble)
    gathering = _overlapped(passes + bubble, work.gathered_bytes * at.data * by["gathered"], _OVERLAP_POWER)
    # Gradients are reduced once, behind the last micro-batch's backward.
    last = gathering / work.micro_batches
    reducing = _overlapped(last, work.reduced_bytes * at.data * by["reduced"], _OVERLAP_POWER) - last
    found = device | {
        "launches": passes - busy,
        "pipeline bubble": bubble,
        "data parallelism": gathering - passes - bubble + reducing,
        "optimizer": work.optimizer_bytes / memory * by["optimizer"],
        "offload": work.offload_bytes / at.host_link * by["offload"] + work.host_optimizer_bytes * by["host"],
        "loop": by["step"],
    }
    return {name: amount * by["total"] for name, amount in found.items()}


def _overlapped(first: Number, second: Number, power: float) -> Number:
    return (first**power + second**power) ** (1 / power)


def formula_seconds(work: StepWork, setup: Setup, accelerator: Accelerator) -> tuple[Part, ...] | None:
    """Seconds of a step by kind of work, by the fitted law; ``None`` where the catalog has no rate. Takes arrays.

    Never less than all products at the datasheet's peak, attention's masked half included, as MFU counts them.
    """
    at = rates(setup, accelerator)
    if at is None:
        return None
    hybrid = work.scan_flops > 0 if is_plain(work.scan_flops) else (work.scan_flops > 0).any()
    amounts = seconds_by_kind(work, at, multipliers(fitted_law(), setup, accelerator, hybrid=bool(hybrid)))
    total: Number = sum(amounts.values())
    longer = maximum(_least_seconds(work, at) / total, 1.0)
    return tuple(
        Part(name=name, amount=amount * longer, formula=_FORMULAS[name], source="step law fitted to published runs")
        for name, amount in amounts.items()
        if not is_plain(amount) or amount > 0
    )


def _least_seconds(work: StepWork, at: Rates) -> Number:
    return (work.matmul_flops + work.head_flops + work.attention_flops + work.scan_flops) / at.flops


_FORMULAS = {
    "matrix products": "FLOPs / peak, and operands' bytes / bandwidth",
    "head": "FLOPs / peak of bf16",
    "attention": "FLOPs of unmasked blocks / peak of bf16",
    "casts": "bytes / bandwidth",
    "scans": "FLOPs of chunks / peak of bf16, and bytes / bandwidth",
    "elementwise": "bytes / bandwidth",
    "adapters": "bytes / bandwidth",
    "logits": "bytes / bandwidth",
    "dequantization": "bytes / bandwidth",
    "tensor parallelism": "bytes / link",
    "context parallelism": "bytes / link",
    "expert parallelism": "bytes / link or network",
    "pipeline transfers": "bytes / link or network",
    "launches": "kernels beyond the work they hide behind",
    "pipeline bubble": "(stages - 1) / micro-batches",
    "data parallelism": "bytes / link or network beyond the work they hide behind",
    "optimizer": "bytes / bandwidth",
    "offload": "bytes / PCIe, and the host's optimizer",
    "loop": "a step",
}


def unseen(shape: ModelShape, setup: Setup, accelerator: Accelerator, law: StepLaw | None = None) -> tuple[str, ...]:
    """Which of model, framework and accelerator (with this framework, in this precision) no row of the fit had."""
    law = law or fitted_law()
    of = levels(setup, accelerator, megatron=bool(is_megatron(setup)))
    (_, framework), (_, name), (_, pair) = of["total"][:3]
    (_, kind) = of["matmul"][0]
    seen = law.effects["total"]
    known = framework in seen["framework"]
    new = {
        "model": shape.guessed or layout(shape) not in law.models,
        "framework": not known,
        # A framework of which nothing is known is not known on any accelerator either: that is in its own width.
        "accelerator": (pair not in seen["framework and accelerator"] if known else name not in seen["accelerator"])
        or kind not in law.effects["matmul"]["precision"],
    }
    return tuple(what for what in new if new[what])


def interval_half_width(widths: Mapping[str, float], framework: str, unknown: tuple[str, ...]) -> float:
    """In factors e: the widest of the framework's own and those of what is unknown. Rows of which several things were unknown
    were off no more than that; adding the widths up held all of them."""
    return max(widths.get(framework, 0.0), *(widths[f"unknown {what}"] for what in unknown), 0.0)


def step_interval(seconds: float, shape: ModelShape, setup: Setup, accelerator: Accelerator) -> Interval:
    """The 90% interval: as wide as rows of the evidence were off that the fit had left out, by what it had seen of them.

    No end is faster than all products at the datasheet's peak."""
    (_, framework), *_ = levels(setup, accelerator, megatron=bool(is_megatron(setup)))["total"]
    widths = fitted_law().half_widths["experts" if shape.experts else "dense"]
    width = interval_half_width(widths, framework, unseen(shape, setup, accelerator))
    at = rates(setup, accelerator)
    least = 0.0 if at is None else float(_least_seconds(step_work(shape, setup), at))
    low = min(seconds, max(seconds * math.exp(-width), least))
    return Interval(value=seconds, low=low, high=seconds * math.exp(width))


def layout(shape: ModelShape) -> tuple[int, int, int]:
    """What tells one model's speed from another's: layers, width, and width of the feed-forward."""
    return shape.layers, shape.hidden, shape.ffn
