"""The public Python API and the command line: thin adapters over the rooms below, no arithmetic.

>>> import vramcalc
>>> vramcalc.estimate(vramcalc.Setup(model="llama-3.1-8b", seq=8192)).memory.peak_device_bytes.value  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from estimator.calibration.file import read_calibration
    from estimator.calibration.fitting import Calibration
    from estimator.calibration.laws import fit
    from estimator.errors import DoesNotFitError, InputError, MissingError
    from estimator.estimate import estimate
    from estimator.measured import MeasuredRun
    from estimator.result import Estimate
    from estimator.run.cost import RunRequest
    from estimator.setup import Setup
    from estimator.units import Interval
    from profiler.store import read_table

_HOMES = {
    "Calibration": "estimator.calibration.fitting",
    "DoesNotFitError": "estimator.errors",
    "Estimate": "estimator.result",
    "InputError": "estimator.errors",
    "Interval": "estimator.units",
    "MeasuredRun": "estimator.measured",
    "MissingError": "estimator.errors",
    "RunRequest": "estimator.run.cost",
    "Setup": "estimator.setup",
    "estimate": "estimator.estimate",
    "fit": "estimator.calibration.laws",
    "read_calibration": "estimator.calibration.file",
    "read_table": "profiler.store",
}

__version__ = "0.1.0"
__all__ = [
    "Calibration", "DoesNotFitError", "Estimate", "InputError", "Interval", "MeasuredRun", "MissingError", "RunRequest",
    "Setup", "estimate", "fit", "read_calibration", "read_table",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Loads what is asked for when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vramcalc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
