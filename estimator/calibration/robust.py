"""Soft L1, the loss that makes the laws robust: quadratic for small residuals, linear for outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

TOLERANCE = 1e-7
"""Of the solver: seven digits, far more than any measurement has."""


def soft_l1(residuals: Array) -> Array:
    """Residuals whose squares are ``2 (sqrt(1 + r²) - 1)``, so that a plain least-squares solver minimises soft L1.

    scipy's own ``loss=`` would apply to the priors as well, which are stacked below the data and stay quadratic.
    """
    import numpy as np

    # The same, written so that small residuals keep their digits.
    return residuals * np.sqrt(2 / (np.sqrt(1 + residuals**2) + 1))


def soft_l1_slope(residuals: Array) -> Array:
    """The derivative of ``soft_l1``."""
    import numpy as np

    root = np.sqrt(1 + residuals**2)
    return np.sqrt((root + 1) / 2) / root
