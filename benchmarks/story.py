"""Writes docs/story.md, every figure from a command or a sum shown: ``python benchmarks/story.py > docs/story.md``.

``--check`` says instead whether the file is what the commands print today (exit 1 where it is not).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from reports.scale import digits

ROOT = Path(__file__).parent.parent
STORY = ROOT / "docs" / "story.md"

# The story's own figures: an epoch of the 0.5B model on one 24 GiB card, and what was scaled from it.
SAMPLES, EPOCH_MINUTES, SHORT_SEQ = 9_846, 45, 512
TOKENS, ROUND_SEQ = 3e12, 8_000
HALF_CARD_GIB, RATIO, CARD_GIB = 12, 800, 80
MINUTES_PER_YEAR = 60 * 24 * 365

ESTIMATE = "vramcalc estimate --params 400e9 --seq 8192"
DATA = "--checkpointing full --attention flash --dataset-tokens 3e12"
ONE = f"{ESTIMATE} --gpu rtx-3090 {DATA}"
CLUSTER_480 = f"{ESTIMATE} --gpu h100 --gpus 480 --tensor-parallel 8 --pipeline-parallel 12 --accumulation 48 {DATA}"
CLUSTER_10000 = (
    f"{ESTIMATE} --gpu h100 --gpus 10000 --tensor-parallel 8 --pipeline-parallel 10 --accumulation 16 {DATA}"
)
MOE = (
    "vramcalc estimate --model docs/moe-1.8t.json --seq 8192 --framework megatron --gpu h100 --gpus 8000 --tensor-parallel 8 "
    "--pipeline-parallel 5 --expert-parallel 8 --sharding zero1 --accumulation 10 --checkpointing selective --attention flash "
    "--dataset-tokens 10e12"
)
MOE_FP8 = f"{MOE} --precision fp8-mixed"
MOE_DAYS = 90
COMMANDS = (ESTIMATE, ONE, CLUSTER_480, CLUSTER_10000, MOE, MOE_FP8)


def run(command: str) -> str:
    """What the command prints on a screen of 90 columns."""
    arguments = [sys.executable, "-m", *shlex.split(command)]
    environment = {**os.environ, "COLUMNS": "90"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    return done.stdout


def document(command: str) -> dict[str, Any]:
    """The same as numbers."""
    return dict(json.loads(run(f"{command} --json")))


def shown(command: str, *headings: str) -> str:
    """The command and those sections of its output that begin with one of ``headings``."""
    sections = run(command).split("\n\n")
    kept = [section.rstrip() for section in sections if section.startswith(headings)]
    assert len(kept) == len(headings), (command, headings, sections)
    return f"```\n$ {command}\n...\n" + "\n...\n".join(kept) + "\n```"


def the_sum() -> str:
    """The story's sum, redone: where its years come from, and the straight proportion without the slip."""
    samples = TOKENS / ROUND_SEQ
    years = samples * EPOCH_MINUTES / MINUTES_PER_YEAR
    memory = HALF_CARD_GIB * RATIO * 4
    cards = memory / CARD_GIB
    copies = round(10_000 / cards)
    sample_seconds = EPOCH_MINUTES * 60 / SAMPLES
    large = sample_seconds * RATIO
    long = large * 8192 / SHORT_SEQ
    return f"""\
| step of the sum | figure |
|---|---|
| memory: {HALF_CARD_GIB} GiB (half the card, 0.5B at 2,048 tokens) x {RATIO} in parameters x 4 in tokens | {memory:,} GiB |
| cards of {CARD_GIB} GiB that hold it | {cards:,.0f} |
| samples: 3 trillion tokens / {ROUND_SEQ:,} | {samples / 1e6:,.0f} million |
| x {EPOCH_MINUTES} minutes each | {years:,.0f} years |
| 10,000 cards hold {10_000 / cards:.1f} copies, say {copies} | {years / copies:,.1f} years |

**The slip.** The {EPOCH_MINUTES} minutes were not a sample's. They were an epoch of {SAMPLES:,} samples of the 0.5B model: {sample_seconds:.2f} s a sample of {SHORT_SEQ}
tokens. In straight proportion a sample of the 400B model takes {sample_seconds:.2f} s x {RATIO} = {large / 60:.1f} minutes at {SHORT_SEQ} tokens, and
x 16 in tokens {long / 60:.0f} minutes at 8,192. That this is near {EPOCH_MINUTES} again is chance: two factors were left out (16 in tokens, {RATIO} in
parameters) and one was put in ({SAMPLES:,} samples). Done right the proportion says {TOKENS / 8192 * long / 60 / MINUTES_PER_YEAR:,.0f} years on one such card, which is what the
commands below print as "the straight proportion". It is still no estimate: it scales the speed of a gaming card."""


def compared() -> str:
    """What the three clusters need, side by side."""
    lines = ["| | memory of a device | fits | time | MFU | cost |", "|---|---|---|---|---|---|"]
    for name, command in (("one RTX 3090", ONE), ("480 H100", CLUSTER_480), ("10,000 H100", CLUSTER_10000)):
        found = document(command)
        days = {end: hours / 24 for end, hours in found["run"]["hours"].items()}
        unit, name_of = (365.25, "years") if days["value"] > 730 else (1, "days")
        value, low, high = (digits(days[end] / unit) for end in ("value", "low", "high"))
        cost = found["run"]["cost_usd"]
        lines.append(
            f"| {name} | {found['memory']['peak_device_bytes']['value'] / 2**30:,.0f} GiB | "
            f"{'yes' if found['fits']['fits'] else 'no'} | {value} {name_of} ({low} to {high}) | {100 * found['time']['mfu']['value']:.0f}% | "
            f"${cost['value'] / 1e6:,.0f}M ({cost['low'] / 1e6:,.0f} to {cost['high'] / 1e6:,.0f}) |"
        )
    return "\n".join(lines)


def the_mixture() -> str:
    """Whether three months are enough, and at which MFU."""
    found = document(MOE)
    model, flops = found["model"], found["time"]["model_flops_per_step"] * found["run"]["steps"]
    lines = [
        f"{model['parameters'] / 1e12:.2f}T parameters, of which {model['active_parameters'] / 1e9:.0f}B are active for a token: "
        f"{flops:.2e} FLOPs in all. What {MOE_DAYS} days ask for, and what this layout (8 tensor x 5 pipeline x 200 data ranks, the "
        "experts over 8) is estimated to do:",
        "",
        "| precision | MFU needed | MFU estimated | days | in three months? |",
        "|---|---|---|---|---|",
        _mixture_row("bf16", found, flops),
        _mixture_row("fp8", document(MOE_FP8), flops),
    ]
    return "\n".join(lines)


def _mixture_row(precision: str, found: dict[str, Any], flops: float) -> str:
    time, goodput = found["time"], found["run"]["goodput"]["value"]
    # The peak of all cards, as the MFU has it; failures and checkpoints take their part of the days.
    peak = time["model_flops_per_step"] / time["mfu"]["value"] / time["step_seconds"]["value"]
    needed = flops / (peak * MOE_DAYS * 86_400 * goodput)
    mfu, days = time["mfu"], {end: hours / 24 for end, hours in found["run"]["hours"].items()}
    if needed <= mfu["low"]:
        answer = "yes, even at the low end"
    elif needed <= mfu["value"]:
        answer = "yes, more likely than not"
    elif needed <= mfu["high"]:
        answer = "it can be, but not more likely than not"
    else:
        answer = "no, not within the interval"
    shares = f"{100 * mfu['value']:.0f}% ({100 * mfu['low']:.0f} to {100 * mfu['high']:.0f})"
    spans = f"{days['value']:.0f} ({days['low']:.0f} to {days['high']:.0f})"
    return f"| {precision} | {100 * needed:.0f}% | {shares} | {spans} | {answer} |"


def story() -> str:
    return f"""\
# The story: 400B at 8k, and 1.8T in three months

Generated by `python benchmarks/story.py > docs/story.md`; every figure is printed by a command shown here or is a sum written out. Intervals are 90%.

Somebody fine-tunes Qwen1.5-0.5B in full on one 24 GiB card, sees that 2,048 tokens take half of it and that an epoch takes {EPOCH_MINUTES} minutes, and scales
that to 400B parameters, 8k tokens of context and 3 trillion tokens of data.

## The sum by hand

{the_sum()}

## The memory

The proportion says 38,400 GiB for one copy. Weights, gradients and optimizer states grow with the parameters, but not with the tokens:

{shown(ESTIMATE, "Memory by part", "Peak memory", "The straight proportion")}

## One card, 480, and 10,000

{compared()}

One RTX 3090 could not hold it; the time is what its rate alone would need:

{shown(ONE, "Does it fit?", "Speed", "The whole run", "The straight proportion")}

The 480 cards that the sum by hand asked for (8 tensor x 12 pipeline x 5 data ranks):

{shown(CLUSTER_480, "Does it fit?", "Speed", "The whole run")}

10,000 (8 x 10 x 125):

{shown(CLUSTER_10000, "Does it fit?", "Speed", "The whole run")}

## 1.8T parameters on 8,000 H100s over 10T tokens in three months

A mixture of experts of that size has no published shape, so one is stated: [moe-1.8t.json](moe-1.8t.json), 120 layers of 12,288, 16 experts a layer, 2 of them active.

{the_mixture()}

{shown(MOE, "Does it fit?", "Speed", "The whole run")}

In fp8, the MFU counted against the fp8 peak:

{shown(MOE_FP8, "Speed")}
"""


def main() -> None:
    if "--check" in sys.argv[1:]:
        if STORY.read_text(encoding="utf-8") != story():
            sys.exit("docs/story.md is not what the commands print; run python benchmarks/story.py > docs/story.md")
        return
    sys.stdout.write(story())


if __name__ == "__main__":
    main()
