"""The chart of memory by method and size as a table: for a terminal, Markdown, CSV and JSON. Pure functions of data."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from reports import scale
from reports.page import Page
from reports.runs import printable
from reports.screen import Screen

if TYPE_CHECKING:
    from estimator.chart import Chart, ChartCell
    from estimator.published_chart import PublishedCell

from estimator.units import GB, GIB

TITLE = "Memory that one device needs, GiB"


def print_chart(screen: Screen, chart: Chart) -> None:
    """As many columns side by side as the width has room for, the rest below."""
    page = Page(screen)
    page.heading(TITLE, chart.assumptions)
    heads, label_width = column_heads(chart), max(len(row.label) for row in chart.rows)
    label_width = min(label_width, page.width // 2)
    texts = [[cell_text(cell) for cell in row.cells] for row in chart.rows]
    widths = [max(len(heads[i]), *(len(line[i]) for line in texts)) for i in range(len(heads))]
    for number, block in enumerate(_blocks(widths, page.width - 2 - label_width)):
        if number:
            page.line("")
        page.line(" " * (2 + label_width) + "".join(f"  {heads[i]:>{widths[i]}}" for i in block), "bold")
        for row, line in zip(chart.rows, texts, strict=True):
            first, *more = _wrapped(row.label, label_width)
            page.line(f"  {first:<{label_width}}" + "".join(f"  {line[i]:>{widths[i]}}" for i in block))
            for rest in more:
                page.line(f"    {rest}")
    for note in notes(chart):
        page.paragraph(note)


def _wrapped(label: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(label, width) or [""]


def _blocks(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Columns that stand beside each other."""
    block: list[int] = []
    used = 0
    for i, width in enumerate(widths):
        if block and used + width + 2 > room:
            yield block
            block, used = [], 0
        block.append(i)
        used += width + 2
    yield block


def column_heads(chart: Chart) -> list[str]:
    """Sizes; names where two have the same size."""
    sizes = [scale.count_text(column.parameters) for column in chart.columns]
    if len(set(sizes)) == len(sizes):
        return sizes
    return [printable(column.name) for column in chart.columns]


def cell_text(cell: ChartCell) -> str:
    """GiB; an asterisk where the accelerator that was named has them."""
    return scale.digits(cell.peak_device_bytes.value / GIB) + ("*" if cell.fits.fits else "")


def notes(chart: Chart) -> list[str]:
    """What the columns are, and what an asterisk means."""
    columns = zip(column_heads(chart), chart.columns, strict=True)
    named = [
        f"{head} {printable(column.name)}"
        for head, column in columns
        if head != printable(column.name) and not column.inferred
    ]
    found = [f"Models: {', '.join(named)}."] if named else []
    devices = {cell.fits.gpu for row in chart.rows for cell in row.cells if cell.fits.fits is not None}
    if devices:
        found.append(f"*: fits {' or '.join(sorted(str(device) for device in devices))}.")
    return found


def chart_markdown(chart: Chart) -> str:
    """A Markdown table, with the assumptions above and the models below."""
    heads = column_heads(chart)
    lines = [f"{TITLE} ({_escaped(chart.assumptions)})", ""]
    lines += ["| | " + " | ".join(_escaped(head) for head in heads) + " |", "|---|" + "---:|" * len(heads)]
    for row in chart.rows:
        cells = (cell_text(cell).replace("*", "\\*") for cell in row.cells)
        lines.append(f"| {_escaped(row.label)} | " + " | ".join(cells) + " |")
    for note in notes(chart):
        lines += ["", _escaped(note)]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return "".join("\\" + letter if letter in "|*_`<>[]" else letter for letter in printable(text))


def chart_csv(chart: Chart) -> str:
    """A line a cell, in base units: the settings, then the device peak with its interval."""
    records = [
        {
            "parameters": column.parameters,
            **cell.setup.as_dict(),
            "peak_device_bytes": cell.peak_device_bytes.value,
            "peak_device_bytes_low": cell.peak_device_bytes.low,
            "peak_device_bytes_high": cell.peak_device_bytes.high,
            "fits": cell.fits.fits,
        }
        for row in chart.rows
        for column, cell in zip(chart.columns, row.cells, strict=True)
    ]
    return _csv(records)


def _csv(records: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def chart_document(chart: Chart) -> dict[str, Any]:
    """For ``--format json`` (schema ``vramcalc/chart/1``), base units."""
    return {
        "schema": "vramcalc/chart/1",
        "assumptions": chart.assumptions,
        "columns": [dataclasses.asdict(column) for column in chart.columns],
        "rows": [{"label": row.label, "cells": [_cell(cell) for cell in row.cells]} for row in chart.rows],
    }


def _cell(cell: ChartCell) -> dict[str, Any]:
    return {
        "setup": cell.setup.as_dict(),
        "peak_device_bytes": dataclasses.asdict(cell.peak_device_bytes),
        "parts_bytes": dict(cell.parts_bytes),
        "fits": cell.fits.fits,
    }


# --- the published chart ----------------------------------------------------------------------------------------------


def print_published(screen: Screen, cells: Sequence[PublishedCell]) -> None:
    """Each published value with ours, line by line of the chart."""
    page = Page(screen)
    for method, group in groupby(cells, lambda cell: cell.method):
        page.heading(f"{method}: published, ours, published / ours")
        for cell in group:
            ours, ratio = _ours(cell)
            start = f"  {cell.size:<6} {_gigabytes(cell.published_bytes):>5} GB  {ours:>8}  {ratio:>4}"
            if len(start) + 2 + len(cell.why) <= page.width:
                page.line(f"{start}  {cell.why}")
            else:
                page.line(start)
                page.paragraph(cell.why, indent=" " * 6)
    page.line("")
    for note in published_notes(cells):
        page.paragraph(note)


def _ours(cell: PublishedCell) -> tuple[str, str]:
    if cell.ours is None or cell.ratio is None:
        return "-", "-"
    return f"{_gigabytes(cell.ours.peak_device_bytes.value)} GB", f"{cell.ratio:.2f}"


def _gigabytes(amount: float) -> str:
    """Whole gigabytes from ten on."""
    return f"{amount / GB:,.{0 if amount >= 9.95 * GB else 1}f}"


def published_notes(cells: Sequence[PublishedCell]) -> list[str]:
    """How far apart the two are in all, what the chart leaves out, and its source."""
    first = next(cell.ours for cell in cells if cell.ours is not None)
    ratios = sorted(cell.ratio for cell in cells if cell.ratio is not None)
    setup = first.setup
    return [
        f"Published values are {ratios[0]:.2f} to {ratios[-1]:.2f} times ours, {ratios[len(ratios) // 2]:.2f} in the middle. "
        "They are bytes a parameter, whatever the tokens: the chart states no sequence length and no batch. Ours are at "
        f"batch {setup.batch} x {setup.seq:,} tokens with checkpointing {setup.checkpointing}; --seq, --batch and "
        "--checkpointing set others.",
        f"Source: {cells[0].source}. GB are 10^9 bytes; models: "
        + ", ".join(dict.fromkeys(f"{cell.size} {cell.model}" for cell in cells))
        + ".",
    ]


def published_markdown(cells: Sequence[PublishedCell]) -> str:
    """A Markdown table of the comparison."""
    lines = ["| method | size | published | ours | ratio | why |", "|---|---|---:|---:|---:|---|"]
    for cell in cells:
        ours, ratio = _ours(cell)
        lines.append(
            f"| {cell.method} | {cell.size} | {_gigabytes(cell.published_bytes)} GB | {ours} | {ratio} | {cell.why} |"
        )
    for note in published_notes(cells):
        lines += ["", _escaped(note)]
    return "\n".join(lines) + "\n"


def published_csv(cells: Sequence[PublishedCell]) -> str:
    """A line a value, in base units."""
    return _csv([_published(cell) for cell in cells])


def published_document(cells: Sequence[PublishedCell]) -> dict[str, Any]:
    """For ``--format json`` (schema ``vramcalc/published-chart/1``), base units."""
    return {"schema": "vramcalc/published-chart/1", "cells": [_published(cell) for cell in cells]}


def _published(cell: PublishedCell) -> dict[str, Any]:
    ours = None if cell.ours is None else cell.ours.peak_device_bytes
    return {
        "edition": cell.edition,
        "method": cell.method,
        "size": cell.size,
        "model": cell.model,
        "parameters": cell.parameters,
        "published_bytes": cell.published_bytes,
        "peak_device_bytes": None if ours is None else ours.value,
        "peak_device_bytes_low": None if ours is None else ours.low,
        "peak_device_bytes_high": None if ours is None else ours.high,
        "published_over_ours": cell.ratio,
        "why": cell.why,
        "source": cell.source,
    }
