"""Comparisons of arrays."""

from typing import Any

import numpy as np


def close(got: Any, want: Any, relative: float = 1e-5) -> None:
    """Equal to `relative` of the largest expected value."""
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=relative * np.abs(want).max())
