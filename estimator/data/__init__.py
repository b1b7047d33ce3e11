"""Facts as data files, a source in every row."""

from __future__ import annotations

import csv
from importlib import resources


def read_data(name: str) -> list[dict[str, str]]:
    """Rows of a CSV file of ``estimator/data``."""
    text = (resources.files("estimator.data") / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
