"""Contrast pairs: two sides that differ in one behaviour, read from JSONL and rendered through the chat template.

A line of a pairs file:

    {"id": "tea-3", "positive": [{"role": "system", "content": "…"}, {"role": "user", "content": "…"}],
     "negative": [...], "positive_response": "…", "negative_response": "…", "family": "tea"}

A side is a list of chat messages or raw text; responses and `family` are optional. Pairs of one family (default: their own
id) never part in a split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from steer.errors import PairsError

Messages = list[dict[str, str]]
Side = Messages | str


@dataclass(frozen=True)
class Rendered:
    """One side as token ids; the first `prompt_length` of them are the prompt, the rest the response."""

    ids: list[int]
    prompt_length: int


def render(tokenizer: Any, side: Side, response: str | None = None) -> Rendered:
    """Token ids of a side: chat messages through the chat template with the generation prompt, raw text as it is.

    The response is tokenised by itself and appended, so that the border between prompt and response is exact.
    """
    ids = list(tokenizer(side)["input_ids"]) if isinstance(side, str) else chat_ids(tokenizer, side)
    tail = list(tokenizer(response, add_special_tokens=False)["input_ids"]) if response else []
    return Rendered(ids + tail, len(ids))


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of chat messages with the generation prompt.

    Raises:
        PairsError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PairsError("the model's tokenizer has no chat template: give raw text instead of chat messages")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class ContrastPair:
    """Two prompts that differ in one behaviour, each with an optional response."""

    id: str
    positive: Side
    negative: Side
    positive_response: str | None = None
    negative_response: str | None = None
    family: str = ""

    def sides(self) -> tuple[tuple[Side, str | None], tuple[Side, str | None]]:
        """((positive, response), (negative, response))."""
        return (self.positive, self.positive_response), (self.negative, self.negative_response)

    def record(self) -> dict[str, Any]:
        """The pair as it stands in a pairs file, empty fields left out."""
        fields = ("id", "positive", "negative", "positive_response", "negative_response", "family")
        return {name: value for name in fields if (value := getattr(self, name)) not in (None, "")}


class ContrastSet(Sequence[ContrastPair]):
    """An immutable list of contrast pairs with unique ids."""

    def __init__(self, pairs: Sequence[ContrastPair]):
        self.pairs = tuple(pairs)
        seen: set[str] = set()
        for pair in self.pairs:
            if pair.id in seen:
                raise PairsError(f'two pairs have the id "{pair.id}"')
            seen.add(pair.id)

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> ContrastPair: ...
    @overload
    def __getitem__(self, index: slice) -> ContrastSet: ...
    def __getitem__(self, index: int | slice) -> ContrastPair | ContrastSet:
        return ContrastSet(self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    def __iter__(self) -> Iterator[ContrastPair]:
        return iter(self.pairs)

    @staticmethod
    def load(path: str | Path) -> ContrastSet:
        """Read a file of pairs, JSONL or CSV by its ending; see `steer.pair_files`.

        Raises:
            PairsError: the file is missing, empty, or a line is broken; the message names file and line.
        """
        from steer.pair_files import read

        return ContrastSet(read(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write the set as JSONL, or as CSV where the file's name ends so."""
        from steer.pair_files import write

        write(Path(path), self.pairs)

    @staticmethod
    def from_instructions(
        positive: str | Sequence[str], negative: str | Sequence[str], prompts: Sequence[str | Messages]
    ) -> ContrastSet:
        """One pair a prompt: the same prompt under a positive and under a negative system instruction.

        With several phrasings of an instruction, prompts take them in turn.
        """
        if not prompts:
            raise PairsError("from_instructions needs at least one prompt")
        up = [positive] if isinstance(positive, str) else list(positive)
        down = [negative] if isinstance(negative, str) else list(negative)
        pairs = []
        for i, prompt in enumerate(prompts):
            messages: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            pairs.append(
                ContrastPair(
                    id=f"pair-{i + 1}",
                    positive=[{"role": "system", "content": up[i % len(up)]}, *messages],
                    negative=[{"role": "system", "content": down[i % len(down)]}, *messages],
                )
            )
        return ContrastSet(pairs)

    def split(
        self, seed: int = 0, fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
    ) -> tuple[ContrastSet, ContrastSet, ContrastSet]:
        """(fit, choose, held_out): by family, from a hash of seed and family, so reordering changes nothing.

        Raises:
            PairsError: fewer than three families, so that a part would be empty.
        """

        def rank(family: str) -> str:
            return hashlib.sha256(f"{seed}|{family}".encode()).hexdigest()

        families = sorted({p.family or p.id for p in self.pairs}, key=rank)
        if len(families) < 3:
            raise PairsError(f"cannot split {len(families)} prompt families into fit, choose and held-out parts")
        first = min(max(1, round(fractions[0] * len(families))), len(families) - 2)
        second = min(max(first + 1, round((fractions[0] + fractions[1]) * len(families))), len(families) - 1)
        part = {f: 0 if i < first else 1 if i < second else 2 for i, f in enumerate(families)}
        groups: tuple[list[ContrastPair], ...] = ([], [], [])
        for p in self.pairs:
            groups[part[p.family or p.id]].append(p)
        return ContrastSet(groups[0]), ContrastSet(groups[1]), ContrastSet(groups[2])

    @property
    def hash(self) -> str:
        """SHA-256 of the pairs, independent of their order."""
        lines = sorted(json.dumps(p.record(), sort_keys=True, ensure_ascii=False) for p in self.pairs)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
