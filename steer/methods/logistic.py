"""Logistic probe of matched pairs: the normal w of the plane that tells positives from negatives *within* each pair,

    min_w  ½ ‖w‖² + C Σ_i log(1 + exp(−⟨w, d_i⟩ / s)),      d_i = p_i − n_i,   s = root mean square of ‖d_i‖

the conditional likelihood of a 1:1 matched design (Breslow et al. 1978, Am. J. Epidemiol. 108:299). What both sides of a pair
share, their topic above all, drops out. Scaling by one number leaves the direction in activation space as it is; scaling each
feature would have to be undone.
"""

from __future__ import annotations

import numpy as np

from steer.errors import NoContrastError
from steer.methods.unit import unit


def logistic(positive: np.ndarray, negative: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Unit normal of the matched-pair logistic probe.

    A probe detects well and steers badly (AxBench, arXiv 2501.17148: 0.94 and 0.10): choose it to read, not to steer.

    Args:
        positive: activations `[n, d_model]`.
        negative: activations of the same pairs `[n, d_model]`.
        strength: C, inverse of the regularisation.

    Returns:
        direction `[d_model]`, float32, unit norm.

    Raises:
        NoContrastError: all differences are zero.
    """
    from sklearn.linear_model import LogisticRegression

    differences = positive.astype(np.float64) - negative
    scale = float(np.sqrt((differences**2).sum(1).mean()))
    if scale == 0.0 or not np.isfinite(scale):
        raise NoContrastError("positive and negative activations are the same: the pairs show no contrast here")
    x = np.concatenate([differences, -differences]) / scale
    y = np.repeat([1, 0], len(differences))
    # each pair stands twice, once from each side, so that half of C goes to each
    probe = LogisticRegression(C=strength / 2, fit_intercept=False, tol=1e-6, max_iter=1000).fit(x, y)
    return unit(probe.coef_[0])
