"""Mean difference: v = (mean(positive) − mean(negative)) / ‖·‖.

Marks & Tegmark 2023 (arXiv 2310.06824), Rimsky et al. 2023 (CAA, arXiv 2312.06681).
"""

from __future__ import annotations

import numpy as np

from steer.methods.unit import unit


def mean_difference(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Unit vector from the negatives' mean to the positives'.

    Args:
        positive: activations `[n, d_model]`.
        negative: activations `[m, d_model]`.

    Returns:
        direction `[d_model]`, float32, unit norm.

    Raises:
        NoContrastError: both means are equal, so there is no direction.
    """
    return unit(positive.mean(0, dtype=np.float64) - negative.mean(0, dtype=np.float64))
