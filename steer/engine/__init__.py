"""vLLM behind `Engine`: the only folder that imports it."""

from __future__ import annotations

from steer.engine.engine import Engine
from steer.engine.result import Completion, Receipt

__all__ = ["Completion", "Engine", "Receipt"]
