"""Arithmetic of steering vectors: sum, difference, negative, multiple, orthogonal part, cosines.

A vector stands for its steps, direction times separation, at the layers it has; that is what is added. The result is a vector of its own with
the steps' norms as separations. Nobody has seen how well it holds, so it has no scores; its lineage says what it was made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from steer.errors import VectorError
from steer.vector import SteeringVector

SMALLEST = 1e-6  # a step this much smaller than what it was made of is nothing but rounding


def step(vector: SteeringVector, layer: int) -> np.ndarray:
    """Direction times separation `[d_model]`, in activation units, float64."""
    return vector.directions[layer].astype(np.float64) * vector.separation[layer]


def ancestor(vector: SteeringVector) -> dict[str, Any]:
    """What a lineage keeps of a vector."""
    kept = {"name": vector.name, "hash": vector.hash, "method": vector.method, "read": vector.read}
    return kept | {"pairs_hash": vector.pairs_hash} | ({"lineage": dict(vector.lineage)} if vector.lineage else {})


def add(a: SteeringVector, b: SteeringVector) -> SteeringVector:
    """a + b, at the layers both have."""
    return _combined("sum", [a, b], f"{a.name} + {b.name}", lambda x, y: x + y)


def subtract(a: SteeringVector, b: SteeringVector) -> SteeringVector:
    """a − b, at the layers both have."""
    return _combined("difference", [a, b], f"{a.name} − {b.name}", lambda x, y: x - y)


def orthogonal(a: SteeringVector, b: SteeringVector) -> SteeringVector:
    """The part of a that is orthogonal to b, layer by layer: a − ⟨a, v_b⟩ v_b, v_b of norm 1."""
    return _combined(
        "orthogonal", [a, b], f"{a.name} without {b.name}", lambda x, y: x - (x @ y) / (y @ y) * y
    )  # fmt: skip


def multiply(vector: SteeringVector, factor: float) -> SteeringVector:
    """factor · vector; a negative factor reverses the direction and its poles."""
    if not np.isfinite(factor) or factor == 0:
        raise VectorError(f"a vector times {factor} is no vector")
    made = _combined("multiple", [vector], f"{factor:g} · {vector.name}", lambda x: factor * x)
    poles = vector.poles if factor > 0 else (vector.poles[1], vector.poles[0])
    return replace(made, poles=poles, lineage=dict(made.lineage) | {"factor": factor})


def cosines(vectors: Sequence[SteeringVector], layer: int) -> np.ndarray:
    """Cosines between the directions of a layer `[n, n]`.

    Raises:
        VectorError: a vector without that layer, or of another width.
    """
    for v in vectors:
        if layer not in v.directions:
            raise VectorError(f'"{v.name}" has no direction at layer {layer}, only at {v.layers}')
        _same_model(vectors[0], v)
    stacked = np.stack([v.directions[layer] for v in vectors]).astype(np.float64)
    return stacked @ stacked.T


def _same_model(a: SteeringVector, b: SteeringVector) -> None:
    differs = [f"width {a.width} and {b.width}"] if a.width != b.width else a.fingerprint.differences(b.fingerprint)
    if differs:
        raise VectorError(f'"{a.name}" and "{b.name}" are of different models: {"; ".join(differs)}')


def _combined(op: str, parts: list[SteeringVector], name: str, combine: Callable[..., np.ndarray]) -> SteeringVector:
    for other in parts[1:]:
        _same_model(parts[0], other)
    layers = [n for n in parts[0].layers if all(n in p.directions for p in parts)]
    if not layers:
        raise VectorError(f"{' and '.join(p.name for p in parts)} have no layer in common")
    directions, separation = {}, {}
    for layer in layers:
        steps = [step(p, layer) for p in parts]
        made = combine(*steps)
        size = float(np.linalg.norm(made))
        if size <= SMALLEST * max(float(np.linalg.norm(s)) for s in steps):
            continue
        directions[layer], separation[layer] = (made / size).astype(np.float32), size
    if not directions:
        raise VectorError(f'"{name}" is zero at every layer')
    first = parts[0]
    selected = tuple(n for n in first.selected if n in directions)
    return SteeringVector(
        directions=directions,
        separation=separation,
        fingerprint=first.fingerprint,
        residual_norm={n: first.residual_norm[n] for n in directions if n in first.residual_norm},
        selected=selected or (min(directions, key=lambda n: abs(n - np.mean(list(directions)))),),
        method=op,
        read=first.read if len({p.read for p in parts}) == 1 else "",
        name=name,
        poles=first.poles,
        tokens=first.tokens,
        lineage={"op": op, "of": [ancestor(p) for p in parts]},
    )
