"""Which calibration a command uses: the one that is named, or the one that was saved for the accelerator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from estimator.setup import Setup

if TYPE_CHECKING:
    from estimator.calibration import Calibration


def find_calibration(given: Path | None, setup: Setup) -> tuple[Calibration | None, str | None]:
    """The laws and the path they come from. A named file must be of the setup's accelerator; InputError otherwise."""
    if given is None and setup.accelerator is None:
        return None, None
    from estimator.calibration_file import default_path

    if given is None:
        assert setup.accelerator is not None
        path = default_path(setup.accelerator)
        if not path.exists():
            return None, None
    else:
        path = given
    from estimator.calibration import matches
    from estimator.calibration_file import read_calibration
    from estimator.errors import InputError

    laws = read_calibration(path)
    if given is not None and not matches(laws, setup.accelerator):
        raise InputError(
            f"calibration: {path} is of {laws.accelerator}, not of {setup.accelerator or 'any accelerator'}; "
            f"write --gpu {laws.accelerator}"
        )
    return laws, str(path)
