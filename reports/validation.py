"""How good the predictions of a table of measured runs were: the JSON document ``vramcalc/validate/1`` and a readable table."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from estimator.score import QUANTITIES, Score
from estimator.validation import Skip, Validation
from reports import scale
from reports.runs import printable

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "vramcalc/validate/1"
_WORST = 8


def validation_document(validation: Validation) -> dict[str, Any]:
    """The contract's document; ``unpredicted`` lists single quantities that a predicted row has no prediction of."""
    return {
        "schema": SCHEMA,
        "overall": _scores(validation.overall),
        "by_source": {source: _scores(scores) for source, scores in validation.by_source},
        "fits": dataclasses.asdict(validation.fits),
        "skipped": [{"run": skip.run, "reason": skip.reason} for skip in validation.skipped],
        "unpredicted": [
            {"run": skip.run, "quantity": skip.quantity, "reason": skip.reason} for skip in validation.unpredicted
        ],
        "rows": [
            {"run": row.run, **{name: dataclasses.asdict(comparison) for name, comparison in row.quantities}}
            for row in validation.rows
        ],
    }


def _scores(scores: Sequence[tuple[str, Score]]) -> dict[str, Any]:
    return {name: dataclasses.asdict(score) for name, score in scores}


def print_validation(console: Console, validation: Validation) -> None:
    """Scores over all rows and by source, the worst rows, fits against out-of-memory, and what was skipped."""
    from rich.table import Table
    from rich.text import Text

    def table(scored: Sequence[tuple[str, Score]], *, header: bool) -> None:
        shown = Table(box=None, pad_edge=False, show_header=header, padding=(0, 1), collapse_padding=True)
        shown.add_column("quantity", no_wrap=True, min_width=max(map(len, QUANTITIES)))
        for name, width in (("n", 3), ("median", 6), ("p90", 5), ("p95", 5), ("worst", 5), ("bias", 6), ("in 90%", 6)):
            shown.add_column(name, justify="right", no_wrap=True, min_width=width)
        for quantity, score in scored:
            numbers = (score.median_ape, score.p90_ape, score.p95_ape, score.max_ape)
            shown.add_row(
                quantity,
                str(score.n),
                *map(scale.percent_text, numbers),
                scale.percent_text(score.bias, sign=True),
                scale.percent_text(score.coverage_90),
            )
        console.print(shown)

    judged = len(validation.rows)
    console.print(Text(f"{judged} rows predicted, {len(validation.skipped)} skipped", style="bold"))
    if validation.overall:
        console.print(Text("Relative errors", style="bold"))
        table(validation.overall, header=True)
        console.print(Text("By source", style="bold"))
        for source, scores in validation.by_source:
            console.print(Text(printable(source)))
            table(scores, header=False)
    fits = validation.fits
    if any(dataclasses.astuple(fits)):
        console.print(
            Text(
                f"Fits: {fits.true_fit} said to fit and did, {fits.false_oom} said not to and did; "
                f"{fits.true_oom} said not to and ran out of memory, {fits.false_fit} said to fit and ran out of memory"
            )
        )
    _print_worst(console, validation)
    for title, skips in (
        ("Skipped", validation.skipped),
        ("Single quantities without a prediction", validation.unpredicted),
    ):
        _print_skips(console, title, skips)


def _print_worst(console: Console, validation: Validation) -> None:
    from rich.text import Text

    every = [(abs(one.error), one.error, name, row) for row in validation.rows for name, one in row.quantities]
    every.sort(key=lambda entry: -entry[0])
    if every:
        console.print(Text("Worst rows", style="bold"))
    for _, error, name, row in every[:_WORST]:
        console.print(Text(printable(f"- {row.run} {name} {scale.percent_text(error, sign=True)} ({row.source})")))


def _print_skips(console: Console, title: str, skips: Sequence[Skip]) -> None:
    from rich.text import Text

    if not skips:
        return
    console.print(Text(title, style="bold"))
    counted = Counter(skip.reason.partition(":")[0] for skip in skips)
    for reason, count in counted.most_common():
        examples = sorted({skip.reason.partition(": ")[2] for skip in skips if skip.reason.startswith(reason)})
        shown = "; ".join(textwrap.shorten(example, 50, placeholder="...") for example in examples[:3])
        more = f"; {len(examples) - 3} more" if len(examples) > 3 else ""
        console.print(Text(printable(f"- {count} x {reason} ({shown}{more})")))
