"""``vramcalc chart``: memory by method and model size, as a table or a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vramcalc.options import axes_options

if TYPE_CHECKING:
    from estimator.chart import Chart
    from estimator.published_chart import PublishedCell

FORMATS = ("table", "markdown", "csv", "svg", "json")
_SUFFIXES = {".md": "markdown", ".csv": "csv", ".svg": "svg", ".json": "json", ".txt": "table"}


@axes_options
def chart(
    *,
    axes: dict[str, list[Any]],
    published: Annotated[
        bool,
        typer.Option(
            "--published", help="The well-known published chart, each value beside ours, and why they differ."
        ),
    ] = False,
    edition: Annotated[
        str | None,
        typer.Option("--edition", help="Which month's edition of the published chart.", show_default="the newest"),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help=f"One of {', '.join(FORMATS)}.", show_default="as --out ends, or table"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it there.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Chart the memory of methods and model sizes, beside the published chart.

    Every setting takes a comma-separated list: a column for each model, a line for each combination of the others. Without
    any: eight models from 0.5B to 405B, the usual methods, 512 tokens, batch 1.
    """
    from estimator.errors import InputError

    chosen = _format(format, out, json_output)
    if edition is not None and not published:
        raise InputError("edition: is of the published chart; write --published as well")
    if published:
        from estimator.published_chart import published_chart

        text = _published_text(chosen, published_chart(edition, _single(axes)), to_screen=out is None)
    else:
        from estimator.chart import make_chart

        text = _chart_text(chosen, make_chart(axes), to_screen=out is None)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"out: cannot write {out}: {error.strerror or error}") from None


def _format(name: str | None, out: Path | None, json_output: bool) -> str:
    from estimator.errors import InputError

    if json_output and name not in (None, "json"):
        raise InputError("json: give --json or --format, not both")
    chosen = "json" if json_output else name or (_SUFFIXES.get(out.suffix.lower(), "table") if out else "table")
    if chosen not in FORMATS:
        raise InputError(f"format: {name!r} is not known; write --format with one of {', '.join(FORMATS)}")
    return chosen


def _single(axes: dict[str, list[Any]]) -> dict[str, Any]:
    """The published chart has its own models and methods; other settings hold for all of it."""
    from estimator.errors import InputError

    for name, values in axes.items():
        flag = "--" + name.replace("_", "-")
        if name in ("model", "method", "precision", "base_quantization", "trainable_layers"):
            raise InputError(f"{name}: the published chart has its own; leave {flag} out, or leave --published out")
        if len(values) > 1:
            raise InputError(f"{name}: the published chart is compared at one value; write {flag} with one")
    return {name: values[0] for name, values in axes.items()}


def _chart_text(chosen: str, chart: Chart, *, to_screen: bool) -> str:
    from reports import chart as reports

    if chosen == "svg":
        from reports.chart_svg import chart_svg

        return chart_svg(chart)
    if chosen == "json":
        from reports.document import render_json

        return render_json(reports.chart_document(chart))
    if chosen == "table":
        return _drawn(lambda screen: reports.print_chart(screen, chart), to_screen)
    return reports.chart_markdown(chart) if chosen == "markdown" else reports.chart_csv(chart)


def _published_text(chosen: str, cells: tuple[PublishedCell, ...], *, to_screen: bool) -> str:
    from estimator.errors import InputError
    from reports import chart as reports

    if chosen == "svg":
        raise InputError("format: the published chart has no figure; write --format table, markdown, csv or json")
    if chosen == "json":
        from reports.document import render_json

        return render_json(reports.published_document(cells))
    if chosen == "table":
        return _drawn(lambda screen: reports.print_published(screen, cells), to_screen)
    return reports.published_markdown(cells) if chosen == "markdown" else reports.published_csv(cells)


def _drawn(draw: Any, to_screen: bool) -> str:
    """What ``draw`` writes; styled only where it goes to a terminal that shows it."""
    import io

    from reports.screen import Screen

    if to_screen:
        draw(Screen())
        return ""
    text = io.StringIO()
    draw(Screen(text, width=100, colour=False))
    return text.getvalue()
