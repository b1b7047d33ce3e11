"""The memory formula judged by the dry run on random setups: ``python benchmarks/formula_vs_dry_run.py [COUNT [SEED [KIND]]]``.

Prints the percentiles of |formula / dry run - 1| of the allocated peak, by method and in all, those of the reserved peak, and
the worst setups: on one device, or with the KIND ``fsdp`` or ``parallel`` (DDP, ZeRO, tensor parallelism) over 2 to 64.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script is run by its path
from benchmarks.sharded_setups import draw_fsdp, draw_parallel
from estimator.dryrun.run import dry_run
from estimator.errors import InputError
from estimator.memory.formula import memory_phases, peak_and_segment_bytes, peak_phase
from estimator.model.catalog import resolve_model
from estimator.possible import check_possible
from estimator.score import percentile
from estimator.setup import QUANTIZATIONS, Setup

MODELS = (
    "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "tinyllama-1.1b", "qwen1.5-0.5b", "llama-3.2-3b", "qwen3-4b", "mistral-7b",
    "llama-3.1-8b", "smollm2-360m", "powerlm-3b", "phi-2", "phi-1.5", "gemma-2b", "gemma-2-9b", "gpt2-124m", "gpt2-large",
    "opt-1.3b", "pythia-1b", "santacoder", "bloom-7b1", "falcon-7b", "nemotron4-15b", "qwen3-30b-a3b", "mixtral-8x7b",
    "gpt-oss-20b", "deepseek-v3-16b-titan-flavor",
)  # fmt: skip
"""One or more of every family that the dry run builds."""
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
"""Of random shapes."""
METHODS = ("full", "full", "full", "lora", "lora", "dora", "qlora", "freeze")
PRECISIONS = ("bf16", "bf16", "bf16-mixed", "bf16-mixed", "fp16-mixed", "fp32")
LOSSES = (
    "standard",
    "standard",
    "standard",
    "chunked",
    "fused-kernel",
    "fused-linear",
    "cut-cross-entropy",
    "compiled",
)
TARGETS = (None, "all-linear", "q_proj v_proj", "q_proj k_proj v_proj o_proj")
OPTIMIZERS = ("adamw", "adamw", "adamw-fused", "adamw-8bit", "adamw-paged", "adafactor", "sgd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """One setup by both ways; bytes of the allocated peak."""

    setup: Setup
    formula_bytes: int
    dry_bytes: int
    formula_reserved_bytes: int
    dry_reserved_bytes: int
    formula_phase: str
    dry_phase: str

    @property
    def relative(self) -> float:
        return self.formula_bytes / self.dry_bytes - 1

    @property
    def relative_reserved(self) -> float:
        return self.formula_reserved_bytes / self.dry_reserved_bytes - 1


def draw(seed: int) -> Iterator[Setup]:
    """Random setups of one device, without end; the same for the same seed."""
    chance = random.Random(seed)
    while True:
        method = chance.choice(METHODS)
        adapters = method in ("lora", "dora", "qlora")
        model = chance.choice(MODELS) if chance.random() < 0.8 else drawn_shape(chance)
        shape = resolve_model(model)
        compiled = chance.random() < 0.12 and shape.rms_norm  # torch's LayerNorm is not dry-run compiled
        setup = Setup(
            model=model,
            framework=chance.choice(("hf-trainer", "hf-trainer", "torch-loop")),
            accelerator=chance.choice(("A100-SXM-80GB", "H100-SXM-80GB")),
            method=method,
            lora_rank=chance.choice((8, 16, 64)) if adapters else None,
            lora_targets=chance.choice(TARGETS) if adapters else None,
            trainable_layers=chance.randint(1, shape.layers) if method == "freeze" else None,
            base_quantization=chance.choice(QUANTIZATIONS) if method == "qlora" else None,
            precision=chance.choice(PRECISIONS),
            optimizer=chance.choice(OPTIMIZERS),
            zero_grad=chance.choice(("none", "none", "zero")),
            checkpointing=chance.choice(("none", "none", "full", "full", "selective")),
            attention=chance.choice(("sdpa", "sdpa", "flash", "eager")),
            loss="standard" if compiled else chance.choice(LOSSES),
            compile=compiled,
            offload="activations" if not compiled and chance.random() < 0.08 else None,
            seq=chance.choice((256, 512, 1024, 2048, 4096)),
            batch=chance.choice((1, 1, 2, 4, 8)),
            accumulation=chance.choice((1, 1, 2)),
        )
        try:
            check_possible(shape, setup.resolved())
        except InputError:
            continue
        yield setup


def drawn_shape(chance: random.Random) -> str:
    """The path of a config.json with a random shape; the same content has the same path."""
    heads = chance.choice((8, 12, 16, 32))
    head_dim = chance.choice((64, 128))
    config = {
        "model_type": chance.choice(FAMILIES),
        "hidden_size": heads * chance.choice((64, 128)),
        "num_hidden_layers": chance.choice((4, 9, 16, 30)),
        "num_attention_heads": heads,
        "num_key_value_heads": chance.choice((heads, heads // 4)),
        "head_dim": head_dim,
        "intermediate_size": 256 * chance.randint(6, 56),
        "vocab_size": 64 * chance.randint(250, 2400),
        "tie_word_embeddings": chance.random() < 0.5,
    }
    if config["model_type"] == "qwen2":
        config["hidden_size"] = heads * head_dim  # its config knows no other
    text = json.dumps(config)
    file = Path(tempfile.gettempdir()) / f"vramcalc-shapes-{os.getuid()}" / f"{zlib.crc32(text.encode()):08x}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return str(file)


_DRAWS = {"one": draw, "fsdp": draw_fsdp, "parallel": draw_parallel}


def compare(setup: Setup) -> Gap | None:
    """Both peaks; ``None`` for what the dry run does not execute."""
    try:
        found = dry_run(setup)
    except InputError:
        return None
    resolved = setup.resolved()
    shape = resolve_model(setup.model)
    peak = peak_phase(memory_phases(shape, resolved))
    return Gap(
        setup=setup,
        formula_bytes=peak.bytes,
        dry_bytes=found.peak_allocated_bytes,
        formula_reserved_bytes=round(peak_and_segment_bytes(shape, resolved)[1]),
        dry_reserved_bytes=found.peak_reserved_bytes,
        formula_phase=peak.phase,
        dry_phase=found.peak_phase,
    )


def stated(setup: Setup) -> str:
    """The settings that are not their default."""
    values = {spec.name: (getattr(setup, spec.name), spec.default) for spec in dataclasses.fields(setup)}
    return " ".join(f"{name}={value}" for name, (value, default) in values.items() if value != default)


def report(gaps: list[Gap]) -> Iterator[str]:
    groups = {"all": gaps} | {m: [g for g in gaps if g.setup.method == m] for m in dict.fromkeys(METHODS)}
    sizes = {name: [abs(gap.relative) for gap in members] for name, members in groups.items()}
    sizes["reserved, all"] = [abs(gap.relative_reserved) for gap in gaps]
    for name, members in sizes.items():
        if members:
            shares = ", ".join(f"p{100 * p:.0f} {100 * percentile(members, p):.2f}%" for p in (0.5, 0.9, 0.95, 1.0))
            yield f"{name}: {len(members)} setups, {shares}"
    yield "worst:"
    for gap in sorted(gaps, key=lambda gap: -abs(gap.relative))[:20]:
        phases = f"{gap.formula_phase}/{gap.dry_phase}"
        yield f"{100 * gap.relative:+6.2f}% {gap.dry_bytes / 2**30:6.2f} GiB {phases}: {stated(gap.setup)}"


def main(count: int, seed: int, kind: str) -> None:
    gaps: list[Gap] = []
    for setup in _DRAWS[kind](seed):
        gap = compare(setup)
        if gap is not None:
            gaps.append(gap)
            print(f"{len(gaps)}/{count}", file=sys.stderr, end="\r")
        if len(gaps) == count:
            break
    print("\n".join(report(gaps)))


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:3]]
    main(*[*numbers, *(200, 1)[len(numbers) :]], (sys.argv[3:] or ["one"])[0])
