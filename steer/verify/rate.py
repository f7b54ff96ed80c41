"""Rates with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A share of n trials with its 95 % Wilson interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:6.1%} [{self.low:.1%}, {self.high:.1%}]"


def rate(outcomes: Iterable[bool | None]) -> Rate:
    """Share of True among all outcomes; None and False both count against it.

    Interval: Wilson 1927, (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n).
    """
    values = [o is True for o in outcomes]
    n = len(values)
    if n == 0:
        return Rate(0.0, 0.0, 1.0, 0)
    p = sum(values) / n
    centre = p + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    # at p = 0 and 1 the bound is exact; rounding must not put it a hair inside
    low = 0.0 if p == 0 else (centre - spread) / scale
    high = 1.0 if p == 1 else (centre + spread) / scale
    return Rate(p, low, high, n)
