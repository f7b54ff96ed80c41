"""Extraction: planted directions, pure noise, padding, read positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from steer import pocket
from steer.capture import capture, captured, read_span
from steer.engine import Engine
from steer.errors import InterventionError, PairsError, RefusedError, SteerError
from steer.extraction import extract, extract_each
from steer.intervention import Gate, Intervention
from steer.pairs import ContrastPair, ContrastSet, Rendered, render
from tests.conftest import make_model


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


def test_left_and_right_padding_and_several_reads_in_one_pass_are_equal(hf: tuple[Any, Any]) -> None:
    model, tokenizer = hf
    pairs = list(pocket.contrast_set("reasons"))[:6]
    items = [render(tokenizer, *p.sides()[side]) for p in pairs for side in (0, 1)]
    reads = ("last_prompt", "response_mean", "response_last", 2, -2)
    both: dict[str, np.ndarray] = {}
    for padding in ("right", "left"):
        values = np.empty((len(reads), 3, len(items), 192), np.float32)
        for batch, part in captured(model, items, [0, 3, 5], reads, batch_tokens=300, padding=padding):
            values[:, :, batch] = part
        both[padding] = values
    scale = np.abs(both["right"]).max()
    assert np.abs(both["left"] - both["right"]).max() < 1e-4 * scale
    for r, read in enumerate(reads):
        alone = capture(model, items, [0, 3, 5], read)
        for k, layer in enumerate((0, 3, 5)):
            np.testing.assert_allclose(both["right"][r, k], alone[layer], atol=1e-4 * scale)


def test_nothing_above_the_highest_layer_is_computed(hf: tuple[Any, Any]) -> None:
    model, tokenizer = hf
    ran: list[int] = []
    handles = [layer.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(model.model.layers)]
    try:
        capture(model, [render(tokenizer, "paint the fence")], [1, 3])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1, 2, 3]


def test_several_methods_and_reads_come_from_one_pass_over_the_texts(hf: tuple[Any, Any]) -> None:
    model, tokenizer = hf
    fit, _, held_out = pocket.contrast_set("reasons").split(0, (0.5, 0.0, 0.5))
    passes: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda _m, _a, out: passes.append(out.shape[0]))
    try:
        found = extract_each(
            model, fit, ("mean_difference", "paired_pca", "logistic", "discriminant"),
            ("last_prompt", "response_mean"), held_out=held_out, tokenizer=tokenizer, source=pocket.MODEL,
        )  # fmt: skip
    finally:
        handle.remove()
    assert sum(passes) == 2 * (len(fit) + len(held_out)), "each text is read once"
    assert len(found) == 8
    alone = extract(model, fit, read="response_mean", held_out=held_out, tokenizer=tokenizer, source=pocket.MODEL)
    assert alone.hash == found["mean_difference", "response_mean"].hash
    for (method, read), vector in found.items():
        assert (vector.method, vector.read) == (method, read)
        if read == "response_mean":
            assert vector.scores[vector.selected[0]].low > 0.9, method


def test_a_learned_direction_does_better_on_unseen_pairs_than_where_it_started(hf: tuple[Any, Any]) -> None:
    from steer.methods.learned import Objective, learned
    from steer.sampling import answered

    model, tokenizer = hf
    pairs = list(pocket.contrast_set("accept"))[:32]
    start = extract(model, ContrastSet(pairs[:20]), layers=[4], tokenizer=tokenizer, source=pocket.MODEL)
    begin = start.directions[4] * start.separation[4]
    up, down = (
        answered(model, tokenizer, [render(tokenizer, *p.sides()[side]) for p in pairs], max_tokens=8)
        for side in (0, 1)
    )
    shift = learned(model, up[:20], down[:20], 4, begin, steps=8)
    objective = Objective(model, up[20:], down[20:], 4)
    with torch.no_grad():
        losses = [float(objective(torch.tensor(v))) for v in (shift, begin, np.zeros_like(begin))]
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] == pytest.approx(2 * np.log(2), abs=1e-4), "without a shift neither response is preferred"
    assert all(p.requires_grad for p in model.parameters())


def test_extract_with_the_learned_method(tmp_path: Any) -> None:
    path = make_model("llama", tmp_path / "llama")
    pairs = ContrastSet(
        [ContrastPair(f"{i}", f"paint the fence {i} red", f"paint the fence {i} blue") for i in range(10)]
    )
    vector = extract(path, pairs[:6], "learned", read=-1, layers=[1, 2], held_out=pairs[6:])
    assert (vector.method, vector.layers) == ("learned", [1, 2])
    best = vector.selected[0]
    assert vector.strength * vector.separation[best] > 0, "the operating point is the step that was learned"
    assert extract(path, pairs[:6], "learned", read=-1, held_out=pairs[6:]).layers != [0, 1, 2, 3]
    with pytest.raises(PairsError, match="needs held_out pairs"):
        extract(path, pairs, "learned")


def test_the_engine_reads_several_positions_in_one_pass(engine: Engine, hf: tuple[Any, Any]) -> None:
    pairs = ContrastSet(list(pocket.contrast_set("reasons"))[:12])
    both = extract_each(engine, pairs, reads=("last_prompt", "response_mean"))
    for (_, read), vector in both.items():
        alone = extract(engine, pairs, read=read)
        for layer in range(3, 8):
            assert float(vector.directions[layer] @ alone.directions[layer]) > 0.98
    with pytest.raises(SteerError, match="needs gradients"):
        extract(engine, pairs, "learned", held_out=pairs)
    with pytest.raises(RefusedError, match="1 to 8 positions"):
        engine.captured(["paint the fence"], reads=[0] * 9).__next__()
