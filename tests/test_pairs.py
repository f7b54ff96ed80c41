"""Pairs: files, errors that name the line, rendering, splits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from steer.errors import PairsError
from steer.pairs import ContrastPair, ContrastSet, render
from steer.pocket.tokenizer import build_tokenizer

GOOD = {"id": "a", "positive": [{"role": "user", "content": "x"}], "negative": "y"}


def test_round_trip(tmp_path: Path) -> None:
    pairs = ContrastSet(
        [
            ContrastPair("a", "up", "down", "yes", "no", "fam"),
            ContrastPair("b", "u", [{"role": "user", "content": "d"}]),
        ]
    )
    pairs.save(tmp_path / "p.jsonl")
    again = ContrastSet.load(tmp_path / "p.jsonl")
    assert again.pairs == pairs.pairs
    assert again.hash == pairs.hash == ContrastSet(pairs.pairs[::-1]).hash


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"id": "b", "positive": "x"', "not a JSON object"),
        ('{"id": "b", "positive": "x"}', '"negative" is missing'),
        ('{"id": "a", "positive": "x", "negative": "y"}', 'the id "a" is already used in line 1'),
        ('{"positive": [{"role": "user"}], "negative": "y"}', 'each message of "positive"'),
        ('{"positive": "x", "negative": "y", "postive_response": "z"}', 'unknown field "postive_response"'),
        ("[1]", "must be a JSON object"),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(PairsError) as error:
        ContrastSet.load(path)
    assert f"{path}:3: " in str(error.value)
    assert says in str(error.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="no such pairs file"):
        ContrastSet.load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(PairsError, match="holds no pairs"):
        ContrastSet.load(tmp_path / "empty.jsonl")


def test_split_keeps_families_together_and_ignores_order() -> None:
    pairs = [ContrastPair(f"{f}-{i}", "u", "d", family=f"f{f}") for f in range(20) for i in range(3)]
    parts = ContrastSet(pairs).split(seed=3)
    families = [{p.family for p in part} for part in parts]
    assert sum(map(len, parts)) == 60
    assert all(families)
    assert not families[0] & families[1]
    assert not (families[0] | families[1]) & families[2]
    shuffled = pairs[:]
    random.Random(1).shuffle(shuffled)
    assert [p.hash for p in ContrastSet(shuffled).split(seed=3)] == [p.hash for p in parts]
    assert ContrastSet(pairs).split(seed=4)[0].hash != parts[0].hash


def test_render_applies_the_chat_template_and_keeps_the_border() -> None:
    tokenizer = build_tokenizer()
    item = render(tokenizer, [{"role": "user", "content": "paint the fence ."}], "certainly ,")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "paint the fence ."}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    assert item.ids[: item.prompt_length] == tokenizer(text)["input_ids"]
    assert item.ids[item.prompt_length :] == tokenizer("certainly ,")["input_ids"]
    tokenizer.chat_template = None
    with pytest.raises(PairsError, match="no chat template"):
        render(tokenizer, [{"role": "user", "content": "x"}])


def test_from_instructions_differs_in_the_system_message_only() -> None:
    pairs = ContrastSet.from_instructions(["be warm", "be kind"], "be cold", ["a", "b", "c"])
    assert [p.positive[0]["content"] for p in pairs] == ["be warm", "be kind", "be warm"]  # type: ignore[index]
    assert all(p.positive[1:] == p.negative[1:] for p in pairs)


def test_csv_is_read_as_the_same_pairs(tmp_path: Path) -> None:
    pairs = ContrastSet(
        [
            ContrastPair("a", 'up, "quoted"\nand on two lines', "down", "yes", "no", "fam"),
            ContrastPair("b", "u\u2028v", [{"role": "user", "content": "d"}]),
        ]
    )
    for name in ("p.csv", "p.jsonl"):
        pairs.save(tmp_path / name)
        assert ContrastSet.load(tmp_path / name).pairs == pairs.pairs


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("positive,negative\nx,y\nx\n", ":3: the row has 1 cells, the header 2"),
        ("positive,negtive\nx,y\n", ':1: unknown column "negtive"'),
        ('positive,negative\n"x\nx",y\n\nx,\n', ':5: "negative" is missing'),
        ('positive,negative\nx,"y\n', ":2: not CSV"),
        ('positive,negative\nx,"[{""role"": }]"\n', ':2: "negative" is not a JSON list'),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(PairsError) as error:
        ContrastSet.load(path)
    assert f"{path}{says}" in str(error.value)


def test_one_prompt_with_two_responses(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "eat?", "positive_response": "yes", "negative_response": "no"}\n')
    (pair,) = ContrastSet.load(path)
    assert pair.positive == pair.negative == [{"role": "user", "content": "eat?"}]
    path.write_text('{"prompt": "eat?", "positive_response": "yes"}\n')
    with pytest.raises(PairsError, match=r'p\.jsonl:1: "negative_response" is missing'):
        ContrastSet.load(path)
