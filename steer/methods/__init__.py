"""Extraction methods: each a pure function (positive, negative) → direction, in its own file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from steer.errors import SteerError
from steer.methods.mean_difference import mean_difference

Method = Callable[[np.ndarray, np.ndarray], np.ndarray]
METHODS: dict[str, Method] = {"mean_difference": mean_difference}


def resolve(method: str | Method) -> tuple[str, Method]:
    """Name and function of a method given by name or as a function."""
    if callable(method):
        return getattr(method, "__name__", "custom"), method
    if method not in METHODS:
        raise SteerError(f'unknown extraction method "{method}": choose from {", ".join(sorted(METHODS))}')
    return method, METHODS[method]


__all__ = ["METHODS", "Method", "mean_difference", "resolve"]
