"""The errors that the command line turns into exit codes; everything else that escapes is a bug (exit 1)."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input (exit 2): one line that names the flag or field, the value, and what to write instead."""


class DoesNotFitError(RuntimeError):
    """The run cannot fit in memory or on the disk (exit 3)."""


class RankError(RuntimeError):
    """A process of several that train together failed, and ended the others (exit 1): one line that says which, and why."""


class MissingError(RuntimeError):
    """A package or device that is needed is not there (exit 4): one line that says how to get it."""
