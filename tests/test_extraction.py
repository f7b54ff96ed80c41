"""Extraction: planted directions, pure noise, padding, read positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from steer import pocket
from steer.capture import capture, read_span
from steer.engine import Engine
from steer.errors import InterventionError, PairsError, RefusedError, SteerError
from steer.extraction import auroc, cross_validated, extract, held_out_score
from steer.intervention import Gate, Intervention
from steer.methods import mean_difference
from steer.pairs import ContrastPair, ContrastSet, Rendered, render
from tests.conftest import make_model


def test_planted_direction_is_found_with_its_sign() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        planted = rng.standard_normal(256)
        planted /= np.linalg.norm(planted)
        shared = 3 * rng.standard_normal((96, 256))  # nuisance both sides of a pair share
        effect = rng.normal(2, 1.5, (96, 1)) * planted
        positive = shared + effect + 0.1 * rng.standard_normal((96, 256))
        negative = shared + 0.1 * rng.standard_normal((96, 256))
        found = mean_difference(positive.astype(np.float32), negative.astype(np.float32))
        assert found @ planted > 0.99
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)


def test_pure_noise_never_looks_good() -> None:
    rng = np.random.default_rng(1)
    means = []
    for _ in range(10):
        positive, negative = rng.standard_normal((2, 64, 1024)).astype(np.float32)
        direction = mean_difference(positive, negative)
        assert auroc(positive @ direction, negative @ direction) > 0.99, "in-sample noise looks perfect"
        score = cross_validated(positive, negative, [str(i) for i in range(64)], mean_difference)
        means.append(score.mean)
        assert score.low <= score.mean <= score.high
    assert abs(np.mean(means) - 0.5) < 0.06


def test_auroc_is_the_share_of_ordered_pairs() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 8, 30).astype(float), rng.integers(0, 8, 20).astype(float)
    brute = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert auroc(a, b) == pytest.approx(brute)
    assert held_out_score(a, a).mean == pytest.approx(0.5)


def test_equal_means_have_no_direction() -> None:
    with pytest.raises(SteerError, match="same mean"):
        mean_difference(np.ones((4, 8), np.float32), np.ones((4, 8), np.float32))


def test_capture_is_padding_proof_and_is_the_block_output(hf: tuple[Any, Any]) -> None:
    model, tokenizer = hf
    texts = ["paint", "let us paint the fence in red . " * 4, "we should visit the lake by train ."]
    items = [render(tokenizer, [{"role": "user", "content": t}]) for t in texts]
    together = capture(model, items)
    for i, item in enumerate(items):
        alone = capture(model, [item])
        with torch.no_grad():
            states = model(input_ids=torch.tensor([item.ids]), output_hidden_states=True, use_cache=False).hidden_states
        for layer in range(8):
            scale = np.linalg.norm(alone[layer][0])
            assert np.linalg.norm(together[layer][i] - alone[layer][0]) < 1e-4 * scale
            if layer < 7:  # Hugging Face normalises the last one
                assert np.linalg.norm(states[layer + 1][0, -1].numpy() - alone[layer][0]) < 1e-4 * scale


def test_read_positions() -> None:
    item = Rendered(list(range(10)), 6)
    assert read_span(item, "last_prompt") == (5, 6)
    assert read_span(item, "response_mean") == (6, 10)
    assert read_span(item, "response_last") == (9, 10)
    assert read_span(item, -3) == (7, 8)
    with pytest.raises(PairsError, match="needs responses"):
        read_span(Rendered([1, 2], 2), "response_mean")
    with pytest.raises(PairsError, match="outside a text of 10 tokens"):
        read_span(item, 10)
    with pytest.raises(SteerError, match="unknown read position"):
        read_span(item, "middle")


def test_extract_scores_every_layer_on_held_out_pairs(hf: tuple[Any, Any]) -> None:
    model, tokenizer = hf
    fit, _, held_out = pocket.contrast_set("accept").split(0, (0.6, 0.0, 0.4))
    vector = extract(model, fit, held_out=held_out, tokenizer=tokenizer, source=pocket.MODEL, name="accept")
    assert vector.layers == list(range(8))
    recipe = pocket.recipe("accept")
    assert vector.scores[recipe.layer].low > 0.9
    assert all(s.n == len(held_out) for s in vector.scores.values())
    assert vector.scores[0].mean < 0.75, "before the first attention layer the last token knows nothing of the persona"
    assert vector.split_hashes["fit"] == fit.hash


def test_extract_on_another_family_and_with_a_users_method(tmp_path: Any) -> None:
    path = make_model("llama", tmp_path / "llama")
    pairs = ContrastSet(
        [ContrastPair(f"{i}", f"paint the fence {i} red", f"paint the fence {i} blue") for i in range(8)]
    )
    vector = extract(path, pairs, method=lambda p, n: np.median(p - n, axis=0), read=-1)
    assert vector.method == "<lambda>"
    assert vector.layers == [0, 1, 2, 3]
    with pytest.raises(SteerError, match="unknown extraction method"):
        extract(path, pairs, method="magic")
    with pytest.raises(SteerError, match="at least 4 pairs"):
        extract(path, pairs[:3])
    with pytest.raises(SteerError, match="layer 9 does not exist"):
        extract(path, pairs, read=-1, layers=[9])


def test_the_serving_engine_reads_its_own_activations(engine: Engine, hf: tuple[Any, Any]) -> None:
    model, tokenizer = hf
    for behaviour, read in (("accept", "last_prompt"), ("reasons", "response_mean")):
        pairs = ContrastSet(list(pocket.contrast_set(behaviour))[:24])
        ours = extract(engine, pairs, read=read)
        theirs = extract(model, pairs, read=read, tokenizer=tokenizer, source=pocket.MODEL)
        assert ours.fingerprint == theirs.fingerprint
        for layer in range(3, 8):  # before the first attention layer there is next to nothing to read
            cosine = float(ours.directions[layer] @ theirs.directions[layer])
            assert cosine > 0.98, (read, layer)
            assert ours.residual_norm[layer] == pytest.approx(theirs.residual_norm[layer], rel=0.02)
    with pytest.raises(SteerError, match="layer 99 does not exist"):
        engine.capture(["paint the fence"], layers=[99])
    with pytest.raises(SteerError, match="needs responses"):
        engine.capture(["paint the fence"], read="response_last")
    with pytest.raises(RefusedError, match="this engine holds"):
        engine.capture([[5] * 5000])
    vector = extract(engine, pairs, read="response_mean")
    for left_out, field in (
        (Intervention(vector, when=Gate(vector)), "when"),
        (Intervention(vector, tokens="generated"), "tokens"),
    ):
        with pytest.raises(InterventionError) as refused:
            engine.capture(["paint the fence"], interventions=[left_out])
        assert refused.value.field == field
