"""What the engine hands back: completions, and the receipt that says what was done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Receipt:
    """What a response says of itself.

    Attributes:
        interventions: canonical records of what was asked, vectors by hash; empty for a plain request.
        intervention_hash: hash over them, "" for a plain request.
        vector_hashes: of all vectors they name, sorted.
        gates: for each intervention with a gate {"intervention", "value", "threshold", "open"}; a closed one did not act.
        weight_version: version of the served weights when the request began.
        weights_changed: the weights were swapped while it ran.
        tokens_steered: tokens of this request that were steered, counted in the worker.
        tokens_cached: prompt tokens taken from the prefix cache.
    """

    interventions: tuple[dict[str, Any], ...]
    intervention_hash: str
    weight_version: int
    weights_changed: bool
    tokens_steered: int
    tokens_cached: int
    vector_hashes: tuple[str, ...] = ()
    gates: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    receipt: Receipt
    finish_reason: str | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)  # per generated token: token id → log-probability
