"""Training data: decisions of the steered teacher, general texts, and how a step's batch is drawn from them.

A batch is a function of (seed, step), so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.errors import SteerError
from steer.pairs import Messages


@dataclass(frozen=True)
class Decision:
    """A prompt and the teacher's answer, as token ids; the answer ends with the end-of-turn token where it finished."""

    prompt: list[int]
    answer: list[int]


def save_jsonl(path: Path, rows: Sequence[Any]) -> None:
    """One JSON value a line; dataclasses as objects."""
    values = [json.dumps(r if isinstance(r, list) else asdict(r)) for r in rows]
    path.write_text("".join(v + "\n" for v in values), encoding="utf-8")


def load_decisions(path: Path) -> list[Decision]:
    """Decisions written by `save_jsonl`."""
    return [Decision(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def load_texts(path: Path) -> list[list[int]]:
    """Token lists written by `save_jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_ids(tokenizer: Any, text: Messages | str) -> list[int]:
    """Token ids of a general text: a conversation through the chat template, or plain text."""
    if not isinstance(text, str):
        text = tokenizer.apply_chat_template(text, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def draw(count: int, available: int, seed: int, step: int, stream: int) -> list[int]:
    """`count` indices for a step: epochs of seeded permutations, cut one after the other."""
    if available < 1:
        raise SteerError("there is nothing to train on")
    picks = []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, available)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + stream * 7919 + epoch)
        picks.append(int(torch.randperm(available, generator=generator)[place]))
    return picks


def pad(rows: Sequence[Sequence[int]], left: bool, fill: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask), both `[rows, longest]` int64."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, part] = torch.tensor(row)
        mask[i, part] = 1
    return ids, mask
