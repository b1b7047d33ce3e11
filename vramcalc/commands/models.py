"""``vramcalc models``: what the catalogs hold."""

from __future__ import annotations

from typing import Annotated

import typer


def models(json_output: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """List the models of the catalog and the accelerators."""
    from estimator.hardware import accelerators
    from estimator.model.catalog import model_names, resolve_model
    from reports.catalog import catalog_document, print_catalog

    shapes = [resolve_model(name) for name in model_names()]
    devices = list(accelerators().values())
    if json_output:
        from reports.document import render_json

        typer.echo(render_json(catalog_document(shapes, devices)), nl=False)
    else:
        from rich.console import Console

        print_catalog(Console(highlight=False), shapes, devices)
