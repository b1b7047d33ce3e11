"""The command line: loads the one command that is asked for, and turns errors into exit codes in one place."""

from __future__ import annotations

import errno
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from estimator.errors import DoesNotFitError, InputError, MissingError, RankError

COMMANDS = {
    "estimate": "Predict memory, time, checkpoints and cost of a fine-tune.",
    "chart": "Chart the memory of methods and model sizes, beside the published chart.",
    "plan": "Search for the cheapest and the fastest plans that fit, and the largest batch and sequence.",
    "profile": "Run short real fine-tunes over a grid, and record what they take.",
    "fit": "Fit the laws of one device - memory, step time, checkpoints - to measured runs.",
    "train": "Run the full fine-tune, and compare it with the estimate.",
    "validate": "Predict every row of a table of measured runs, and score the predictions.",
    "report": "Write an HTML report: figures, residuals, laws, bigger models, losses. It opens without a network.",
    "models": "List the models of the catalog and the accelerators.",
    "doctor": "Show versions, devices, free memory and disk, and what is missing.",
}
"""Every command with the first line of its help, so that the others need not be imported to be listed."""


def make_app(wanted: str | None) -> typer.Typer:
    """The application with ``wanted`` imported and the other commands as names only."""
    app = typer.Typer(
        name="vramcalc",
        help="Know before you train: will it fit, how long, how much - then train, and check.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, summary in COMMANDS.items():
        if name == wanted:
            module = importlib.import_module(f"vramcalc.commands.{name}")
            app.command(name)(getattr(module, name))
        else:
            app.command(name, help=summary)(_named_only)
    return app


def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=lambda given: _version(given)
    ),
) -> None:
    pass


def _version(given: bool) -> None:
    if given:
        from vramcalc import __version__

        typer.echo(f"vramcalc {__version__}")
        raise typer.Exit


def _named_only() -> None:
    raise AssertionError("a command that was not imported was run")


def run(arguments: Sequence[str] | None = None) -> None:
    """The entry point: runs one command and exits with the code that DESIGN.md gives each kind of end."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names from elsewhere may hold what a terminal's encoding has not
    wanted = next((word for word in given if not word.startswith("-")), None)
    sys.exit(_guard(lambda: make_app(wanted)(args=given, standalone_mode=False, prog_name="vramcalc")))


def _guard(action: Callable[[], Any]) -> int:
    """Runs ``action`` and names its end: 0 done, 2 bad input, 3 does not fit, 4 something missing, 130 interrupted."""
    try:
        result = action()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except typer.Abort:
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except InputError as error:
        return _fail(error, 2)
    except DoesNotFitError as error:
        return _fail(error, 3)
    except MissingError as error:
        return _fail(error, 4)
    except RankError as error:
        return _fail(error, 1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in {
            "vramcalc",
            "reports",
            "harness",
            "profiler",
            "estimator",
        }:
            raise
        return _fail(f"{error.name} is not installed; pip install 'vramcalc-toolkit[all]'", 4)
    except (BrokenPipeError, SystemExit):  # typer itself exits only where the reader of its output has gone
        _silence_stdout()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _silence_stdout()
        return _fail(f"output: cannot be written: {error.strerror}", 2)
    except Exception as error:
        message = getattr(error, "format_message", None)  # what the command line's parser raises
        if message is None:
            raise
        said = message()
        return _fail(f"{said} (see vramcalc --help)" if said else "no command given; see vramcalc --help", 2)


def _fail(error: object, code: int) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


def _open_closed_streams() -> None:
    """Python has no stream where the shell closed one (``>&-``): nobody reads it."""
    import os

    sys.stdout, sys.stderr = (
        stream or Path(os.devnull).open("w")  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr)
    )


def _silence_stdout() -> None:
    """The reader of the pipe has gone: nothing that is still buffered may raise at exit."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
