"""``vramcalc train``: the full fine-tune, between its estimate and what it took."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from estimator.setup import Setup
from vramcalc.options import setup_options


@setup_options
def train(
    *,
    setup: Setup,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where checkpoints and results go; run again to resume.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="JSONL, CSV, Parquet, a directory of them, or a hub id.", show_default="an offline set"
        ),
    ] = None,
    prompt_format: Annotated[
        str, typer.Option("--prompt-format", help="How a sample becomes text: chat, alpaca, plain.")
    ] = "chat",
    samples: Annotated[
        str | None,
        typer.Option("--samples", metavar="N", help="Sequences of one epoch.", show_default="all that the data has"),
    ] = None,
    dataset_tokens: Annotated[
        str | None, typer.Option("--dataset-tokens", metavar="N", help="Tokens of one epoch, instead of --samples.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="How often the data is seen.")] = 3,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps, instead of --epochs.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="The first one; it falls linearly to zero.")
    ] = 5e-5,
    save_steps: Annotated[
        int | None, typer.Option("--save-steps", help="Steps between checkpoints.", show_default="an epoch's")
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option("--eval-steps", help="Steps between evaluations within an epoch.", show_default=False),
    ] = None,
    keep: Annotated[int, typer.Option("--keep", help="Newest checkpoints that are kept, besides the best.")] = 2,
    seed: Annotated[int, typer.Option("--seed", help="Of the data's order and of random weights.")] = 0,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Laws of `vramcalc fit`; else those saved for this machine.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train even though it is not expected to fit.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what --out holds of an earlier run.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON, in base units.")] = False,
) -> None:
    """Run the full fine-tune, and compare it with the estimate.

    What cannot fit in memory or on the disk is refused beforehand. A run that was killed goes on from its last checkpoint
    when the same command is given again. With --gpus N it starts a process for each; started by torchrun, on any number of
    machines, it is one of them.
    """
    import sys
    from dataclasses import replace

    from estimator.units import parse_count
    from harness.checkpoints import checkpoints
    from harness.plan import TrainPlan
    from harness.train import train as run
    from harness.world import joined_world
    from profiler.device import local_device
    from vramcalc.calibrations import find_calibration
    from vramcalc.train_display import TrainDisplay

    plan = TrainPlan(
        setup=setup,
        out=out,
        data=data,
        prompt_format=prompt_format,
        samples=None if samples is None else parse_count(samples, "samples"),
        dataset_tokens=None if dataset_tokens is None else parse_count(dataset_tokens, "dataset_tokens"),
        epochs=epochs,
        steps=steps,
        learning_rate=learning_rate,
        save_steps=save_steps,
        eval_steps=eval_steps,
        keep=keep,
        seed=seed,
        force=force,
        restart=restart,
    )
    here = replace(setup, accelerator=setup.accelerator or local_device().name)
    laws, name, _ = find_calibration(calibration, here)
    joined = joined_world()
    try:
        with TrainDisplay() as display:
            result = run(
                plan,
                on_estimate=display.show_estimate,
                on_progress=display.show,
                calibration=laws,
                calibration_name=name,
            )
    except KeyboardInterrupt:
        if joined is not None and not joined.is_main:
            raise
        saved = checkpoints(out) if out.is_dir() else []
        where = saved[-1].path if saved else "the beginning: no checkpoint was written yet"
        print(f"the same command goes on from {where}", file=sys.stderr)
        raise
    if joined is not None and not joined.is_main:
        return  # of what torchrun started, the first speaks
    if json_output:
        from harness.train_result import to_document
        from reports.document import render_json

        typer.echo(render_json(to_document(result)), nl=False)
        return
    from rich.console import Console

    from reports.trained import print_trained

    print_trained(Console(highlight=False), result, out)
