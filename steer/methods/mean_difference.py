"""Mean difference: v = (mean(positive) − mean(negative)) / ‖·‖.

Marks & Tegmark 2023 (arXiv 2310.06824), Rimsky et al. 2023 (CAA, arXiv 2312.06681).
"""

from __future__ import annotations

import numpy as np

from steer.errors import NoContrastError


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
    difference = positive.mean(0, dtype=np.float64) - negative.mean(0, dtype=np.float64)
    norm = float(np.linalg.norm(difference))
    if norm == 0.0 or not np.isfinite(norm):
        raise NoContrastError("positive and negative activations have the same mean: the pairs show no contrast here")
    return (difference / norm).astype(np.float32)
