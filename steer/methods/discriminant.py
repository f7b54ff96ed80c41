"""Linear discriminant with shrinkage, the whitened mean difference: v ∝ Σ⁻¹ (mean(positive) − mean(negative)), where Σ is the
covariance within a side, shrunk towards a multiple of the identity by the amount of Ledoit & Wolf 2004 (J. Multivar. Anal. 88:365).

Fisher 1936; as a way to read concepts: Belrose et al. 2023 (LEACE, arXiv 2306.03819), Marks & Tegmark 2023 (arXiv 2310.06824, "mass-mean").
"""

from __future__ import annotations

import numpy as np

from steer.methods.unit import unit


def discriminant(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Unit normal of the plane between the sides if both were Gaussian with one covariance.

    Args:
        positive: activations `[n, d_model]`.
        negative: activations `[m, d_model]`.

    Returns:
        direction `[d_model]`, float32, unit norm.

    Raises:
        NoContrastError: both means are equal.
    """
    from sklearn.covariance import ledoit_wolf

    p, n = positive.astype(np.float64), negative.astype(np.float64)
    difference = p.mean(0) - n.mean(0)
    unit(difference)  # no contrast is found out before anything is inverted
    within = np.concatenate([p - p.mean(0), n - n.mean(0)])
    if not within.any():
        return unit(difference)
    return unit(_solve(within, difference, float(ledoit_wolf(within, assume_centered=True)[1])))


def _solve(within: np.ndarray, difference: np.ndarray, shrinkage: float) -> np.ndarray:
    """((1 − λ) WᵀW/n + λμI)⁻¹ δ with μ = tr(WᵀW/n)/d, through the smaller of the two Gram matrices (Woodbury)."""
    n, width = within.shape
    ridge = shrinkage * float((within**2).sum()) / (n * width)
    w = within * np.sqrt((1 - shrinkage) / n)
    if ridge == 0.0:
        return np.linalg.lstsq(w.T @ w, difference, rcond=None)[0]
    if width <= n:
        return np.linalg.solve(w.T @ w + ridge * np.eye(width), difference)
    inner = np.linalg.solve(w @ w.T + ridge * np.eye(n), w @ difference)
    return (difference - w.T @ inner) / ridge
