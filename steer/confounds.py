"""What a direction could mean instead of the behaviour: checks of a contrast set before anything is read off a model.

A mean difference finds whatever differs between the sides: their length, their language, a template's tokens. And held-out
pairs are only held out if nothing of them stood in the pairs that were fitted.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer.pairs import ContrastPair, ContrastSet, Side

FEWEST = 8  # pairs on which a difference between the sides is judged
LANGUAGE_CHARACTERS = 200  # of each side in all; less says little of its language
MARKUP = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<</?SYS>>")


@dataclass(frozen=True)
class Confound:
    """One thing that is wrong with a set, and the pairs it concerns.

    Attributes:
        kind: length, language, template, duplicate, contrast or leak.
        message: one sentence.
        pairs: ids.
    """

    kind: str
    message: str
    pairs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class ConfoundWarning(UserWarning):
    """A contrast set has a confound."""


def confounds(pairs: ContrastSet, tokenizer: Any = None, parts: Sequence[ContrastSet] | None = None) -> list[Confound]:
    """All confounds found in a set.

    Args:
        pairs: the whole set.
        tokenizer: whose special tokens count as template tokens, besides the usual ones.
        parts: of a split; None: what a split by family could tear apart.
    """
    found = [*_contrast(pairs), *_duplicates(pairs), *_length(pairs), *_language(pairs), *_template(pairs, tokenizer)]
    return found + (_leaks(pairs) if parts is None else _shared(parts))


def _text(side: Side, response: str | None) -> str:
    spoken = side if isinstance(side, str) else "\n".join(m["content"] for m in side)
    return f"{spoken}\n{response}" if response else spoken


def _texts(pair: ContrastPair) -> tuple[str, str]:
    """(positive, negative) without what both sides have in common: messages, or responses, that are the same."""
    (up, said), (down, answered) = pair.sides()
    if up == down:
        return said or "", answered or ""
    if isinstance(up, list) and isinstance(down, list):
        up, down = [m for m in up if m not in down], [m for m in down if m not in up]
    same = said == answered
    return _text(up, None if same else said), _text(down, None if same else answered)


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def _contrast(pairs: ContrastSet) -> list[Confound]:
    same = [p.id for p in pairs if p.sides()[0] == p.sides()[1]]
    return [Confound("contrast", f"both sides are the same in {_few(same)}", tuple(same))] if same else []


def _duplicates(pairs: ContrastSet) -> list[Confound]:
    groups: dict[str, list[str]] = defaultdict(list)
    for p in pairs:
        groups[json.dumps(p.sides(), sort_keys=True)].append(p.id)
    found = []
    for ids in groups.values():
        if len(ids) > 1:
            found.append(Confound("duplicate", f"{_few(ids)} say the same", tuple(ids)))
    return found


def _length(pairs: ContrastSet) -> list[Confound]:
    """Sides of different length: a sign test over the pairs, and a difference that is worth the name."""
    from scipy.stats import binomtest

    lengths = [(len(a), len(b)) for a, b in map(_texts, pairs)]
    up, down = sum(a for a, _ in lengths), sum(b for _, b in lengths)
    longer, shorter = sum(a > b for a, b in lengths), sum(a < b for a, b in lengths)
    if len(pairs) < FEWEST or longer + shorter == 0 or max(up, down) < 1.25 * min(up, down):
        return []
    if binomtest(longer, longer + shorter).pvalue > 0.01:
        return []
    side, times = ("positive", longer) if up > down else ("negative", shorter)
    message = (
        f"the {side} side is the longer one in {times} of {len(pairs)} pairs, "
        f"{max(up, down) / len(pairs):.0f} to {min(up, down) / len(pairs):.0f} characters on average"
    )
    return [Confound("length", message)]


def _language(pairs: ContrastSet) -> list[Confound]:
    from py3langid.langid import classify

    joined = ["\n".join(side) for side in zip(*map(_texts, pairs), strict=True)]
    if min(map(len, joined)) < LANGUAGE_CHARACTERS:
        return []
    up, down = (classify(text)[0] for text in joined)
    return [Confound("language", f"the positive side reads as {up}, the negative as {down}")] if up != down else []


def _template(pairs: ContrastSet, tokenizer: Any) -> list[Confound]:
    special = [t for t in getattr(tokenizer, "all_special_tokens", []) if t.strip()]
    found: dict[str, list[str]] = defaultdict(list)
    for p in pairs:
        text = "\n".join(_text(*side) for side in p.sides())
        for token in {*MARKUP.findall(text), *(t for t in special if t in text)}:
            found[token].append(p.id)
    return [
        Confound("template", f'the text of {_few(ids)} holds the template token "{token}"', tuple(ids))
        for token, ids in sorted(found.items())
    ]


def _prompts(pair: ContrastPair) -> set[str]:
    """What a split must not tear apart: the user's last message of each side, or the raw text."""
    found = set()
    for side, _ in pair.sides():
        if isinstance(side, str):
            found.add(side)
        else:
            asked = [m["content"] for m in side if m["role"] == "user"]
            found.add("\n".join(asked) if asked else json.dumps(side))
    return {" ".join(text.lower().split()) for text in found}


def _leaks(pairs: ContrastSet) -> list[Confound]:
    """Prompts that stand in several families, so that a split may put them on both sides."""
    families: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for p in pairs:
        for prompt in _prompts(p):
            families[prompt][p.family or p.id].append(p.id)
    torn = [[i for ids in by.values() for i in ids] for by in families.values() if len(by) > 1]
    ids = tuple(sorted({i for group in torn for i in group}))
    if not ids:
        return []
    message = f"{len(ids)} pairs share their prompt with a pair of another family ({_few(ids)}): give them one family"
    return [Confound("leak", message, ids)]


def _shared(parts: Sequence[ContrastSet]) -> list[Confound]:
    """Prompts that stand in several parts of a split."""
    where: dict[str, set[int]] = defaultdict(set)
    for number, part in enumerate(parts):
        for p in part:
            for prompt in _prompts(p):
                where[prompt].add(number)
    torn = {prompt for prompt, numbers in where.items() if len(numbers) > 1}
    ids = tuple(p.id for part in parts for p in part if _prompts(p) & torn)
    return (
        [Confound("leak", f"{len(ids)} pairs have a prompt that another part has too ({_few(ids)})", ids)]
        if ids
        else []
    )
