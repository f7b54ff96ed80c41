"""The embedded model: a small Qwen3.5 that speaks a small language with exact judges, shipped with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from steer.errors import SteerError
from steer.pairs import ContrastSet, Messages
from steer.pocket.language import Request
from steer.pocket.words import BEHAVIOURS

MODEL = Path(__file__).parent / "model"
DATA = Path(__file__).parent / "data"
VECTORS = Path(__file__).parent / "vectors"
TEMPERATURE = 0.8  # what its figures are measured at


@dataclass(frozen=True)
class HeldOut:
    """A prompt whose last request training never showed, and that request, which the judge needs."""

    messages: Messages
    request: Request


@dataclass(frozen=True)
class Recipe:
    """How the shipped contrast set of a behaviour is best used: found on the choose prompts, stated in the model's README."""

    behaviour: str
    poles: tuple[str, str]
    read: str
    tokens: str
    layer: int
    strength: float


def check_behaviour(name: str) -> str:
    """The name, if the pocket language has such a behaviour."""
    if name not in BEHAVIOURS:
        raise SteerError(f'the pocket model has no behaviour "{name}": choose from {", ".join(BEHAVIOURS)}')
    return name


def contrast_set(behaviour: str) -> ContrastSet:
    """The shipped contrast pairs of a behaviour."""
    return ContrastSet.load(DATA / f"pairs-{check_behaviour(behaviour)}.jsonl")


def _lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def prompts(part: str) -> list[HeldOut]:
    """Prompts without a persona: "choose" (for layer and strength), "distill" (for training), "held_out" (for the verdict)."""
    return [HeldOut(r["messages"], Request(**r["request"])) for r in _lines(f"prompts-{part}.jsonl")]


def neutral(part: str) -> list[Messages | str]:
    """Neutral conversations and texts, "train" (the general mix) or "held_out" (where cost is measured)."""
    return [r["text"] if "text" in r else r["messages"] for r in _lines(f"neutral-{part}.jsonl")]


def recipe(behaviour: str) -> Recipe:
    """The shipped recipe of a behaviour."""
    raw = json.loads((DATA / "recipes.json").read_text())[check_behaviour(behaviour)]
    return Recipe(behaviour, BEHAVIOURS[behaviour].poles, raw["read"], raw["tokens"], raw["layer"], raw["strength"])


__all__ = [
    "BEHAVIOURS",
    "DATA",
    "MODEL",
    "TEMPERATURE",
    "VECTORS",
    "HeldOut",
    "Recipe",
    "check_behaviour",
    "contrast_set",
    "neutral",
    "prompts",
    "recipe",
]
