"""Paired PCA: the first right singular vector of the *uncentred* differences d_i = p_i − n_i, argmax over ‖v‖ = 1 of Σ_i ⟨v, d_i⟩².

Zou et al. 2023 (LAT, arXiv 2310.01405), Tigges et al. 2023 (arXiv 2310.15154). Centring the differences first, as several
libraries do, subtracts the mean difference, which is the very thing looked for.
"""

from __future__ import annotations

import numpy as np

from steer.errors import NoContrastError
from steer.methods.unit import unit, voted


def paired_pca(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Unit vector that carries most of the pairs' differences, its sign voted by them.

    Args:
        positive: activations `[n, d_model]`.
        negative: activations of the same pairs `[n, d_model]`.

    Returns:
        direction `[d_model]`, float32, unit norm.

    Raises:
        NoContrastError: all differences are zero.
    """
    from sklearn.decomposition import TruncatedSVD  # PCA without centring

    differences = positive.astype(np.float64) - negative
    largest = float(np.abs(differences).max())
    if largest == 0.0 or not np.isfinite(largest):
        raise NoContrastError("positive and negative activations are the same: the pairs show no contrast here")
    differences /= largest
    if min(differences.shape) == 1:
        return unit(voted(np.linalg.svd(differences, full_matrices=False)[2][0], differences))
    fitted = TruncatedSVD(n_components=1, algorithm="arpack", random_state=0).fit(differences)
    return unit(voted(np.asarray(fitted.components_)[0], differences))
