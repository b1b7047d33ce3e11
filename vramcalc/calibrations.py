"""Which calibration a command uses: the one that is named, or the one that was saved for the accelerator."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from estimator.setup import Setup

if TYPE_CHECKING:
    from estimator.calibration.fitting import Calibration


def find_calibration(given: Path | None, setup: Setup) -> tuple[Calibration | None, str | None, Setup]:
    """The laws, the path they come from, and the setup on their device.

    A file that is named decides the device where the setup does not, and must be of the setup's otherwise (InputError).
    """
    if given is not None:
        return _named(given, setup)
    if setup.accelerator is None:
        return None, None, setup
    from estimator.calibration.file import default_path, read_calibration

    path = default_path(setup.accelerator)
    return (read_calibration(path), str(path), setup) if path.exists() else (None, None, setup)


def _named(path: Path, setup: Setup) -> tuple[Calibration, str, Setup]:
    from estimator.calibration.file import read_calibration
    from estimator.calibration.fitting import matches
    from estimator.errors import InputError

    laws = read_calibration(path)
    if setup.accelerator is None:
        return laws, str(path), dataclasses.replace(setup, accelerator=laws.accelerator)
    if not matches(laws, setup.accelerator):
        raise InputError(
            f"calibration: {path} is of {laws.accelerator}, not of {setup.accelerator}; write --gpu {laws.accelerator}"
        )
    return laws, str(path), setup
