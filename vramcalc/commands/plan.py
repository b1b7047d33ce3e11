"""``vramcalc plan``: searches the settings that were not given for the plans that nothing beats in time and money."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vramcalc.options import axes_options

if TYPE_CHECKING:
    from estimator.planning.search import Plans
    from estimator.planning.space import Space
    from estimator.setup import Setup


@axes_options
def plan(
    *,
    axes: dict[str, list[Any]],
    dataset_tokens: Annotated[
        str | None, typer.Option("--dataset-tokens", metavar="N", help="Tokens of one epoch: 1e9, 3T.")
    ] = None,
    samples: Annotated[str | None, typer.Option("--samples", metavar="N", help="Sequences of one epoch.")] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="How often the data is seen.")] = 1.0,
    global_batch: Annotated[
        int | None,
        typer.Option(
            "--global-batch",
            min=1,
            help="Sequences of an optimizer step over all devices.",
            show_default="2^17 tokens; for 1e11 and more to train, 2^22",
        ),
    ] = None,
    deadline: Annotated[str | None, typer.Option("--deadline", metavar="TIME", help="At most: 36h, 90d.")] = None,
    budget: Annotated[float | None, typer.Option("--budget", help="Dollars, at most.", show_default=False)] = None,
    max_gpus: Annotated[
        int | None, typer.Option("--max-gpus", min=1, help="Accelerators, at most.", show_default="512")
    ] = None,
    owned: Annotated[bool, typer.Option("--owned", help="The accelerators cost nothing by the hour.")] = False,
    price: Annotated[
        float | None, typer.Option("--price", help="Dollars for one GPU-hour.", show_default="catalog median")
    ] = None,
    provider: Annotated[str | None, typer.Option("--provider", help="Prices of this provider alone.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Machines that can be taken back at any time.")] = False,
    reserve: Annotated[
        str | None, typer.Option("--reserve", metavar="BYTES", help="Device memory that something else holds: 2GiB.")
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option("--host-memory", metavar="BYTES", help="Memory of one machine, which offloading has to fit."),
    ] = None,
    dry_run: Annotated[
        bool | None,
        typer.Option(
            "--dry-run/--no-dry-run",
            help="Confirm what is shown on fake tensors (needs torch).",
            show_default="with --gpus 1",
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the plans as JSON, in base units.")] = False,
) -> None:
    """Search for the cheapest and the fastest plans that fit, and the largest batch and sequence.

    Whatever is not given is searched: accelerators and their count, sharding and parallel degrees, micro-batch and
    accumulation, checkpointing, offloading to the host. What changes the result of the training (method, precision,
    optimizer) is searched only where several values are given: --method full,lora,qlora; what would be cheaper is said.
    """
    from estimator.errors import DoesNotFitError, InputError
    from estimator.planning.alternatives import alternatives
    from estimator.planning.largest import largest
    from estimator.planning.search import Limits
    from estimator.planning.search import plan as search
    from estimator.planning.space import Space
    from estimator.run.cost import RunRequest
    from estimator.units import parse_bytes, parse_count, parse_hours

    space = Space.of(
        axes,
        global_batch=global_batch,
        most_accelerators=max_gpus,
        owned=owned,
    )
    if owned and (price is not None or provider is not None or spot or budget is not None):
        raise InputError("owned: what is owned has no price; give --owned, or --price, --provider, --spot and --budget")
    request = RunRequest(
        dataset_tokens=None if dataset_tokens is None else parse_count(dataset_tokens, "dataset_tokens"),
        samples=None if samples is None else parse_count(samples, "samples"),
        epochs=epochs,
        price_usd_per_gpu_hour=0.0 if owned else price,
        provider=provider,
        spot=spot,
        reserve_bytes=0 if reserve is None else parse_bytes(reserve, "reserve"),
        host_memory_bytes=None if host_memory is None else parse_bytes(host_memory, "host_memory"),
    )
    limits = Limits(hours=None if deadline is None else parse_hours(deadline, "deadline"), usd=budget)
    confirm = _confirmation(space, request.reserve_bytes, dry_run)
    plans = search(space, request, limits, fits=confirm)
    from reports.plans import Search

    outcome = Search(
        plans=plans,
        largest=largest(space, request.reserve_bytes, host_memory_bytes=request.host_memory_bytes, fits=confirm),
        alternatives=alternatives(space, request, limits, plans),
        request=request,
        limits=limits,
        command=_command,
        trains=_trains,
    )
    if json_output:
        from reports.document import render_json
        from reports.plans import plans_document

        typer.echo(render_json(plans_document(outcome)), nl=False)
    else:
        from reports.plans import print_plans
        from reports.screen import Screen

        print_plans(Screen(), outcome)
    if not plans.fitting:
        raise DoesNotFitError(_why_nothing_fits(plans))


def _why_nothing_fits(plans: Plans) -> str:
    from reports.scale import memory_text
    from reports.terminal import describe_setup

    text = f"plan: none of {plans.searched:,} setups fits; "
    if plans.nearest is None:
        return text + "some would with more host memory, to offload to; write --host-memory N, or --gpus with more"
    return text + f"the nearest is {memory_text(plans.nearest.bytes)} too large: {describe_setup(plans.nearest.setup)}"


def _trains(setup: Setup) -> bool:
    """Whether ``vramcalc train`` runs it, on a machine that has the devices."""
    from estimator.errors import InputError
    from harness.several import check_trainable

    try:
        check_trainable(setup.resolved())
    except InputError:
        return False
    return True


def _confirmation(space: Space, reserve_bytes: int, wanted: bool | None) -> Callable[[Setup], bool] | None:
    """The dry run as a judge of what the formula says fits; ``None`` where it is not wanted or cannot be.

    Left to itself it judges searches for one device alone: there it is exact, and takes seconds. What cannot be dry-run
    stays as the formula has it, unless a dry run was asked for.
    """
    from estimator.errors import InputError, MissingError

    if wanted is False or (wanted is None and space.given.get("accelerators") != (1,)):
        return None
    known: dict[Setup, bool] = {}
    said = set[str]()

    def fits(setup: Setup) -> bool:
        from estimator.dryrun.run import check_dry_runnable
        from estimator.estimate import estimate
        from estimator.fits import fits_by_dry_run
        from estimator.run.cost import RunRequest

        # From the second micro-batch on, which finds gradients, each is like the last.
        setup = dataclasses.replace(setup, accumulation=min(setup.accumulation, 2))
        if setup in known:
            return known[setup]
        try:
            check_dry_runnable(setup)
        except InputError as error:
            if wanted:
                raise
            if str(error) not in said:
                said.add(str(error))
                print(f"not confirmed by a dry run: {error}", file=sys.stderr)
            known[setup] = estimate(setup, request=RunRequest(reserve_bytes=reserve_bytes)).fits.fits is True
            return known[setup]
        print(f"dry run: {setup.accelerator}, batch {setup.batch} x {setup.seq:,} tokens", file=sys.stderr)
        known[setup] = fits_by_dry_run(setup, reserve_bytes=reserve_bytes)
        return known[setup]

    try:
        from estimator.dryrun.run import check_dry_runnable

        check_dry_runnable(next(space.bases()))
    except MissingError as error:
        if wanted:
            raise
        print(f"not confirmed by a dry run: {error}", file=sys.stderr)
        return None
    except (InputError, StopIteration):
        pass  # said of each setup that is to be judged
    return fits


def _command(setup: Setup, data: list[str]) -> str:
    """The ``vramcalc train`` of one plan: what differs from the defaults."""
    from vramcalc.options import flags_of

    name = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in setup.model.rsplit("/", 1)[-1])
    return " ".join(["vramcalc train", *flags_of(setup), *data, "--out", f"runs/{name}"])
