"""What a request to the engine consists of, besides its prompt and interventions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer.errors import InterventionError
from steer.intervention import Intervention


@dataclass(frozen=True)
class Sampling:
    """How one answer is sampled."""

    seed: int | None = 0
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    logprobs: int | None = None
    ignore_eos: bool = False


def per_prompt(given: Sequence[Any], n: int) -> list[Sequence[Intervention]]:
    """The interventions of each of n prompts, from one list for all or a list for each."""
    if not given or isinstance(given[0], Intervention):
        return [given] * n
    if len(given) != n:
        raise InterventionError(f"{len(given)} lists of interventions for {n} prompts")
    return list(given)
