"""Confounds: each planted one is named with its pairs, and the shipped sets have none that matter."""

from __future__ import annotations

import random

import pytest

from steer import pocket
from steer.confounds import confounds
from steer.pairs import ContrastPair, ContrastSet
from steer.pocket.tokenizer import build_tokenizer

ENGLISH = "we should visit the lake by train this evening and have dinner with our friends "
GERMAN = "wir sollten heute Abend mit dem Zug an den See fahren und mit unseren Freunden essen "


def kinds(pairs: list[ContrastPair], **more) -> list[str]:
    return [c.kind for c in confounds(ContrastSet(pairs), **more)]


def clean(count: int = 12) -> list[ContrastPair]:
    return [
        ContrastPair(f"{i}", f"yes gladly to request number {i}", f"no, never to request number {i}")
        for i in range(count)
    ]


def test_a_clean_set_has_none() -> None:
    assert kinds(clean()) == []


def test_length() -> None:
    pairs = [ContrastPair(f"{i}", f"yes {i} " + "indeed " * 9, f"no {i}") for i in range(12)]
    assert kinds(pairs) == ["length"]
    (found,) = confounds(ContrastSet(pairs))
    assert "the positive side is the longer one in 12 of 12 pairs" in str(found)
    random.seed(0)
    mixed = [
        ContrastPair(f"{i}", "a " * random.randint(5, 20) + f"{i}", "b " * random.randint(5, 20) + f"{i}")
        for i in range(40)
    ]
    assert "length" not in kinds(mixed)


def test_what_both_sides_say_does_not_count_as_length() -> None:
    shared = {"role": "user", "content": "please tell me a long story " * 20}
    up = [{"role": "system", "content": "be warm and kind to the one who asks, always"}, shared]
    down = [{"role": "system", "content": "be cold"}, shared]
    pairs = [ContrastPair(f"{i}", up, down, family="f") for i in range(10)]
    assert "length" in kinds(pairs)


def test_language() -> None:
    pairs = [ContrastPair(f"{i}", f"{ENGLISH}{i}", f"{GERMAN}{i}") for i in range(8)]
    assert "language" in kinds(pairs)
    assert "reads as en, the negative as de" in "; ".join(map(str, confounds(ContrastSet(pairs))))


def test_template_tokens() -> None:
    pairs = [*clean(), ContrastPair("raw", "<|im_start|>user\nhello", "no, never to all of it")]
    found = [c for c in confounds(ContrastSet(pairs)) if c.kind == "template"]
    assert [c.pairs for c in found] == [("raw",)]
    own = build_tokenizer().all_special_tokens[0]
    assert "template" in kinds([*clean(), ContrastPair("own", f"a {own} b", "c")], tokenizer=build_tokenizer())


def test_duplicates_and_pairs_without_contrast() -> None:
    pairs = [*clean(), ContrastPair("again", clean()[3].positive, clean()[3].negative), ContrastPair("same", "x", "x")]
    found = {c.kind: c.pairs for c in confounds(ContrastSet(pairs))}
    assert found["duplicate"] == ("3", "again")
    assert found["contrast"] == ("same",)
    assert set(found["leak"]) == {"3", "again"}


def test_leaks_between_families_and_between_parts() -> None:
    asked = [{"role": "user", "content": "What shall we eat?"}]
    pairs = [
        *clean(),
        ContrastPair("a", asked, asked, "yes", "no"),
        ContrastPair("b", [{"role": "user", "content": "what  shall we EAT?"}], asked, "sure", "nope"),
    ]
    found = [c for c in confounds(ContrastSet(pairs)) if c.kind == "leak"]
    assert [set(c.pairs) for c in found] == [{"a", "b"}]
    parts = [ContrastSet(pairs[:13]), ContrastSet(pairs[13:])]
    (torn,) = [c for c in confounds(ContrastSet(pairs), parts=parts) if c.kind == "leak"]
    assert set(torn.pairs) == {"a", "b"}
    whole = [ContrastSet(pairs[:12]), ContrastSet(pairs[12:])]
    assert "leak" not in kinds(pairs, parts=whole)


@pytest.mark.parametrize("behaviour", pocket.BEHAVIOURS)
def test_the_shipped_sets_do_not_leak(behaviour: str) -> None:
    pairs = pocket.contrast_set(behaviour)
    assert "leak" not in {c.kind for c in confounds(pairs, parts=pairs.split())}
