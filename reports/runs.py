"""What a set of measured runs has in common and what varies between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from estimator.setup import setting_types

if TYPE_CHECKING:
    from estimator.measured import MeasuredRun

_OWN_COLUMNS = ("model", "batch", "seq")


def varied_settings(runs: Sequence[MeasuredRun]) -> list[str]:
    """The settings that differ between the runs, apart from model, batch and sequence, which every table shows."""
    names = [name for name in setting_types() if name not in _OWN_COLUMNS]
    return [name for name in names if len({getattr(run.setup, name) for run in runs}) > 1]


def setting_text(value: Any) -> str:
    """A setting's value as people read it; a default that was not written out is a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def printable(text: str) -> str:
    """``text`` without control characters: a table from elsewhere must not steer the terminal or break a line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
