"""A calibration on a terminal: what each law found, how well it predicted what it had not seen, and what was dropped."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from estimator.calibration.fitting import Calibration, Coefficient, Law
from reports import scale
from reports.runs import printable
from reports.series import QUANTITIES

if TYPE_CHECKING:
    from rich.console import Console


def print_calibration(console: Console, calibration: Calibration) -> None:
    """Law by law, in lines that 60 columns hold."""
    covered = calibration.range
    _line(
        console, f"Laws of {calibration.device or calibration.accelerator}, from {len(calibration.runs)} runs", "bold"
    )
    _line(
        console,
        f"{', '.join(covered.models)}: {scale.count_text(covered.parameters_low)} to {scale.count_text(covered.parameters_high)} "
        f"parameters, {covered.tokens_low:,} to {covered.tokens_high:,} tokens in a micro-batch; {', '.join(covered.precisions)}; "
        f"{', '.join(covered.methods)}",
    )
    for law in calibration.laws:
        _print_law(console, law)
    if calibration.dropped:
        _line(console, "")
        _line(console, "Dropped", "bold")
        reasons = Counter((drop.quantity, drop.reason) for drop in calibration.dropped)
        for (quantity, reason), count in reasons.items():
            what = "every law" if quantity == "all" else _title(quantity).lower()
            _line(console, f"- {count} run{'s' * (count > 1)} for {what}: {reason}")


def _print_law(console: Console, law: Law) -> None:
    _line(console, "")
    _line(console, f"{_title(law.quantity)} ({law.runs} runs)", "bold")
    for coefficient in law.coefficients:
        value, bounds = coefficient_text(law.quantity, coefficient)
        _line(console, f"  {coefficient.name:<21} {value:>13}  {bounds}".rstrip())
    _line(console, f"  Runs that the fit did not see: 90% within {scale.percent_text(law.residual)}.")
    held = law.held_out
    if held is None:
        _line(console, "  Not tested on anything larger: profile one more model size.")
    else:
        one = held.score
        _line(
            console,
            f"  Without {held.what}: its {one.n} run{'s' * (one.n > 1)} predicted from the other {held.fitted_runs}, "
            f"{scale.percent_text(one.median_ape)} off in the median, {scale.percent_text(one.max_ape)} at worst; "
            f"{scale.percent_text(one.coverage_90)} inside the 90% interval.",
        )


def coefficient_text(quantity: str, coefficient: Coefficient) -> tuple[str, str]:
    """A coefficient and its 90% interval as people speak of it: rates for seconds a FLOP or byte, shares of the formula."""
    value, low, high = coefficient.value, coefficient.low, coefficient.high
    if quantity == "step_seconds" and coefficient.unit in ("s/FLOP", "s/B") and low > 0:
        rate = scale.flops_text if coefficient.unit == "s/FLOP" else scale.disk_text
        slow, fast = rate(1 / high), rate(1 / low)
        if slow.rpartition(" ")[2] == fast.rpartition(" ")[2]:
            slow = slow.rpartition(" ")[0]
        else:
            slow += "/s"
        return f"{rate(1 / value)}/s", f"{slow} to {fast}/s"
    if coefficient.unit == "":
        return f"x {value:.4f}", f"{low:.4f} to {high:.4f}"
    unit = "seconds" if quantity == "step_seconds" else "bytes"
    # A bound of a trillionth of a byte is nothing, and reads as nothing.
    least = 0.5 if unit == "bytes" else 1e-9
    value, low, high = (number if number >= least else 0.0 for number in (value, low, high))
    return scale.value_text(value, unit), scale.range_text(low, high, unit)


def _title(column: str) -> str:
    return next((quantity.title for quantity in QUANTITIES if quantity.name == column), column)


def _line(console: Console, text: str, style: str = "") -> None:
    from rich.text import Text

    console.print(Text(printable(text), style=style), overflow="fold")
