"""Extraction methods: each a pure function (positive, negative) → direction, in its own file with equation and source.

`learned` is another kind: it optimises the direction on the model itself and so is given the model and the texts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from steer.errors import SteerError
from steer.methods.contrast_consistent import contrast_consistent
from steer.methods.discriminant import discriminant
from steer.methods.logistic import logistic
from steer.methods.mean_difference import mean_difference
from steer.methods.paired_pca import paired_pca

Method = Callable[[np.ndarray, np.ndarray], np.ndarray]
METHODS: dict[str, Method] = {
    f.__name__: f for f in (mean_difference, paired_pca, logistic, discriminant, contrast_consistent)
}
LEARNED = "learned"


def resolve(method: str | Method) -> tuple[str, Method]:
    """Name and function of a method given by name or as a function. A learned direction starts from the mean difference."""
    if callable(method):
        return getattr(method, "__name__", "custom"), method
    if method == LEARNED:
        return LEARNED, mean_difference
    if method not in METHODS:
        raise SteerError(f'unknown extraction method "{method}": choose from {", ".join([*METHODS, LEARNED])}')
    return method, METHODS[method]


__all__ = [
    "LEARNED",
    "METHODS",
    "Method",
    "contrast_consistent",
    "discriminant",
    "logistic",
    "mean_difference",
    "paired_pca",
    "resolve",
]
