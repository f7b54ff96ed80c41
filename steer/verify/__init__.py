"""Measuring what a direction does and what it costs."""

from __future__ import annotations

from steer.verify.cost import neutral_kl
from steer.verify.rate import Rate, rate

__all__ = ["Rate", "neutral_kl", "rate"]
