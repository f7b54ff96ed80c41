"""Write the shipped contrast sets, prompts and neutral texts of the pocket model into a folder, from seeds.

    python examples/pocket_model/make_data.py steer/pocket/data

Every request in them is from the fifth of (thing, option) pairs that training never showed, and the parts share no
request text: contrast pairs, choose, distill and held-out prompts are disjoint.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from steer.pairs import ContrastPair, ContrastSet
from steer.pocket.language import Request, answer, neutral_chat, plain_text, question, sample_request
from steer.pocket.words import BEHAVIOURS

PAIRS = 160
PROMPTS = {"choose": 96, "distill": 640, "held_out": 400}
NEUTRAL = {"train": 320, "held_out": 160}

used: set[str] = set()


def fresh(rng: random.Random) -> Request:
    """A request whose text no earlier part has used."""
    while True:
        request = sample_request(rng, held_out=True)
        if request.text not in used:
            used.add(request.text)
            return request


def history(rng: random.Random) -> list[dict[str, str]]:
    """Nothing, or one or two earlier turns: half of the prompts are multi-turn."""
    messages: list[dict[str, str]] = []
    for _ in range(rng.choices((0, 1, 2), weights=(50, 30, 20))[0]):
        if rng.random() < 0.3:
            asked, reply = question(rng)
        else:
            request = sample_request(rng, held_out=False)
            asked, reply = request.text, answer(rng, request, {})
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    return messages


def prefix(rng: random.Random, request: Request, behaviour: str) -> str:
    """The answer up to where the behaviour is decided: the response both sides of a contrast pair share."""
    words = answer(rng, request, {}).split()
    if behaviour in ("accept", "formal"):
        return ""
    if behaviour == "together":
        return " ".join(words[:2])
    end = words.index(".") + 1
    if behaviour == "warm" and words[end : end + 1] == ["this"]:
        end = words.index(".", end) + 1
    return " ".join(words[:end])


def contrast_set(rng: random.Random, behaviour: str) -> ContrastSet:
    b = BEHAVIOURS[behaviour]
    pairs = []
    for i in range(PAIRS):
        request = fresh(rng)
        messages = [*history(rng), {"role": "user", "content": request.text}]
        response = prefix(rng, request, behaviour) or None
        n = rng.randrange(len(b.positive))
        pairs.append(
            ContrastPair(
                id=f"{behaviour}-{i + 1}",
                positive=[{"role": "system", "content": b.positive[n]}, *messages],
                negative=[{"role": "system", "content": b.negative[n]}, *messages],
                positive_response=response,
                negative_response=response,
                family=f"{request.domain}-{request.thing}",
            )
        )
    return ContrastSet(pairs)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(20260101)
    for part, count in PROMPTS.items():
        lines = []
        for _ in range(count):
            request = fresh(rng)
            messages = [*history(rng), {"role": "user", "content": request.text}]
            lines.append(json.dumps({"messages": messages, "request": vars(request)}))
        (folder / f"prompts-{part}.jsonl").write_text("\n".join(lines) + "\n")
    for behaviour in BEHAVIOURS:
        contrast_set(rng, behaviour).save(folder / f"pairs-{behaviour}.jsonl")
    for part, count in NEUTRAL.items():
        lines = []
        for i in range(count):
            chat = i % 3 != 2
            lines.append(json.dumps({"messages": neutral_chat(rng)} if chat else {"text": plain_text(rng)}))
        (folder / f"neutral-{part}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
