"""What every method ends with: a raw direction made a unit vector, and its sign voted on by the pairs."""

from __future__ import annotations

import numpy as np

from steer.errors import NoContrastError


def unit(direction: np.ndarray) -> np.ndarray:
    """The direction `[d_model]` with norm 1, as float32.

    Raises:
        NoContrastError: it is zero or not finite.
    """
    norm = float(np.linalg.norm(direction))
    if norm == 0.0 or not np.isfinite(norm):
        raise NoContrastError("positive and negative activations have the same mean: the pairs show no contrast here")
    return (np.asarray(direction, dtype=np.float64) / norm).astype(np.float32)


def voted(direction: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """The direction or its opposite, whichever more pairs move along: sign(Σ_i sign⟨v, d_i⟩), ties by the mean.

    Projections are of the differences as they are. Centred ones carry no sign: a vote on them is a coin.

    Args:
        direction: `[d_model]`.
        differences: positive minus negative of each pair, `[n, d_model]`.
    """
    moved = differences @ direction
    vote = float(np.sign(moved).sum()) or float(moved.mean())
    return -direction if vote < 0 else direction
