"""Prints published whole trainings against their estimates: ``python benchmarks/whole_runs.py``."""

from __future__ import annotations

from collections.abc import Iterable

from estimator.whole_runs import WholeRunScore, score_whole_runs, skipped_runs


def table(scores: Iterable[WholeRunScore]) -> str:
    lines = [
        "| run | accelerators | published | predicted | 90% interval | error | held | layout |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for score in scores:
        run, hours = score.run, score.predicted
        where = f"{run.setup.accelerators:,} x {run.setup.accelerator}"
        cells = (run.name, where, f"{run.gpu_hours:,.4g}", f"{hours.value:,.4g}", f"{hours.low:,.3g} to {hours.high:,.3g}",
                 f"{100 * score.error:+.0f}%", "yes" if score.held else "NO", run.layout_source)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    scores = score_whole_runs()
    stated = [score for score in scores if score.run.stated]
    others = [score for score in scores if not score.run.stated]
    print(
        f"Accelerator-hours. Size, tokens, layout and pretraining-only hours stated ({len(stated)}):\n\n{table(stated)}\n"
    )
    print(f"Something assumed, or hours that hold more ({len(others)}):\n\n{table(others)}\n")
    print("Left out: " + "; ".join(f"{count} rows, {reason}" for reason, count in skipped_runs().items()))


if __name__ == "__main__":
    main()
