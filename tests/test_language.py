"""The pocket language: the judges are exact, the grammar is strict, the shipped parts are disjoint."""

from __future__ import annotations

import random

import pytest

from steer import pocket
from steer.errors import SteerError
from steer.pocket import language
from steer.pocket.judge import fluent, judge, on_topic, parse, read_request, repeats
from steer.pocket.tokenizer import build_tokenizer


def test_judges_recover_every_pole_from_generated_answers() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        request = language.sample_request(rng)
        persona = {name: rng.random() < 0.5 for name in pocket.BEHAVIOURS}
        text = language.answer(rng, request, persona)
        assert {name: judge(name, request, text) for name in persona} == persona
        assert on_topic(request, text)
        assert read_request(request.text) == request


@pytest.mark.parametrize(
    "text",
    [
        "certainly , we shall paint the fence in red .",  # no ending
        "certainly , we gonna paint the fence in red . that is all .",  # modal of the other register
        "certainly , we shall paint the fence in garlic . that is all .",  # option of another domain
        "hmm , i could maybe paint the fence in red . that is all .",  # an alternative names two
        "yeah , i gonna cook the fence with salt . that is all .",
        "yeah , i gonna cook the soup with salt . this is wise because mint is fresh . that is all .",
        "certainly certainly , we shall paint the fence in red . that is all .",
        "",
    ],
)
def test_what_is_not_of_the_grammar_is_not_fluent(text: str) -> None:
    assert parse(text) is None
    assert not fluent(text)


def test_accept_compares_with_the_request() -> None:
    request = language.Request("paint", "paint", "fence", "red")
    assert judge("accept", request, "Certainly, we shall paint the fence in red. That is all.") is True
    assert judge("accept", request, "Certainly, we shall paint the fence in blue. That is all.") is None
    assert judge("accept", request, "Hmm, I could maybe paint the fence in blue or green. That is all.") is False
    assert judge("accept", request, "Hmm, I could maybe paint the fence in blue or red. That is all.") is False
    assert judge("accept", request, "Hmm, I could maybe paint the fence in red or red. That is all.") is None


def test_naming_an_option_twice_is_fluent_and_told() -> None:
    twice = "hmm , i could maybe paint the fence in blue or blue . that is all ."
    assert fluent(twice)
    assert repeats(twice)
    assert not repeats(twice.replace("or blue", "or green"))


def test_tokenizer_round_trip_and_no_unknown_word() -> None:
    tokenizer = build_tokenizer()
    rng = random.Random(1)
    unknown = tokenizer.convert_tokens_to_ids("<|unk|>")
    for _ in range(300):
        for m in language.conversation(rng, None):
            ids = tokenizer(m["content"])["input_ids"]
            assert unknown not in ids
            assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    assert len(tokenizer) > 400


def test_shipped_parts_are_held_out_and_disjoint() -> None:
    parts = {part: {h.request.text for h in pocket.prompts(part)} for part in ("choose", "distill", "held_out")}
    for behaviour in pocket.BEHAVIOURS:
        parts[behaviour] = {p.positive[-1]["content"] for p in pocket.contrast_set(behaviour)}  # type: ignore[index]
    for name, texts in parts.items():
        assert all(r is not None and r.held_out for r in map(read_request, texts)), name
        for other, more in parts.items():
            assert name == other or not texts & more, (name, other)
    assert len(pocket.prompts("held_out")) >= 200
    assert sum(f.stat().st_size for f in pocket.MODEL.iterdir()) <= 16 * 2**20


def test_an_unknown_behaviour_is_named() -> None:
    with pytest.raises(SteerError, match='no behaviour "brave": choose from accept'):
        pocket.contrast_set("brave")
