"""``vramcalc doctor``: what this machine has and lacks."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(json_output: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Show versions, devices, free memory and disk, and what is missing."""
    from profiler.checkup import checkup
    from reports.checkup import checkup_document, print_checkup

    state = checkup()
    if json_output:
        from reports.document import render_json

        typer.echo(render_json(checkup_document(state)), nl=False)
    else:
        from rich.console import Console

        print_checkup(Console(highlight=False), state)
