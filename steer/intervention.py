"""Intervention: what is done to which layers at which tokens; its JSON form and its hash.

Every operation is one formula on the block output h of a token, summed over the interventions k that apply there:

    h' = h + Σ_k a_k v_k          add: a = strength · separation of the layer

A strength of 1.0 moves from the negatives' mean to the positives'. The same arithmetic runs in vLLM (`steer.engine`) and on
a Hugging Face model (`steer.reference`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steer.errors import InterventionError
from steer.vector import SteeringVector

OPS = ("add",)
TOKENS = ("all", "prompt", "generated")


@dataclass(frozen=True)
class Intervention:
    """One vector, applied.

    Attributes:
        vector: the directions.
        strength: multiple of the separation; negative moves to the other pole, 0 does nothing.
        op: "add".
        layers: layers to act at; None: the vector's selected layers, or all it has.
        tokens: scope, "all", "prompt" or "generated". A generated token is one that was sampled and is fed back.
    """

    vector: SteeringVector
    strength: float = 1.0
    op: str = "add"
    layers: tuple[int, ...] | None = None
    tokens: str = "all"

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise InterventionError(f'unknown op "{self.op}": choose from {", ".join(OPS)}')
        if self.tokens not in TOKENS:
            raise InterventionError(f'unknown token scope "{self.tokens}": choose from {", ".join(TOKENS)}')
        if not isinstance(self.strength, int | float) or not math.isfinite(self.strength):
            raise InterventionError(f"strength must be a finite number, not {self.strength!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
            missing = [layer for layer in self.layers or () if layer not in self.vector.directions]
            if missing or not self.layers:
                raise InterventionError(
                    f"layer {missing[0] if missing else 'list'} is not in the vector, which has {self.vector.layers}"
                    if missing
                    else "layers is empty: name at least one layer"
                )

    @property
    def at(self) -> tuple[int, ...]:
        """The layers it acts at."""
        return self.layers or self.vector.selected or tuple(self.vector.layers)

    def shift(self, layer: int) -> np.ndarray:
        """a · v of one layer for strength 1: separation times direction, `[d_model]` float32."""
        return np.float32(self.vector.separation[layer]) * self.vector.directions[layer].astype(np.float32)

    def record(self) -> dict[str, Any]:
        """Canonical JSON form; the vector stands as its hash."""
        return {
            "vector": self.vector.hash,
            "op": self.op,
            "strength": float(self.strength),
            "layers": list(self.at),
            "tokens": self.tokens,
        }

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return hash_of([self])


def hash_of(interventions: Sequence[Intervention]) -> str:
    """One hash for a list of interventions; their order does not matter, since their effects add up."""
    records = sorted(json.dumps(i.record(), sort_keys=True) for i in interventions)
    return hashlib.sha256("\n".join(records).encode()).hexdigest()
