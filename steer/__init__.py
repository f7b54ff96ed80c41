"""Steer: contrast pairs → direction → steered in vLLM → distilled into the weights → vector removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ContrastPair", "ContrastSet", "Engine", "Intervention", "SteeringVector", "extract"]

if TYPE_CHECKING:
    from steer.engine import Engine
    from steer.extraction import extract
    from steer.intervention import Intervention
    from steer.pairs import ContrastPair, ContrastSet
    from steer.vector import SteeringVector

_HOME = {
    "ContrastPair": "steer.pairs",
    "ContrastSet": "steer.pairs",
    "Engine": "steer.engine",
    "Intervention": "steer.intervention",
    "SteeringVector": "steer.vector",
    "extract": "steer.extraction",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import steer` stays cheap."""
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'steer' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found
