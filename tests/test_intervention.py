"""The grammar of an intervention: formula against closed forms, scopes, gates, JSON form, hash; bad input names its field."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from steer.errors import InterventionError
from steer.fingerprint import Fingerprint
from steer.intervention import Gate, Intervention, hash_of, parse
from steer.reference import steered
from steer.scope import parse_scope, positions_of
from tests.conftest import random_vector

PRINT = Fingerprint(width=192)


def at_layer(hf: Any, ids: list[int], layer: int, interventions: list[Intervention], prompt: int) -> torch.Tensor:
    """Block output of a layer `[tokens, d_model]` on a steered model."""
    found: list[torch.Tensor] = []

    def hook(_module: Any, _args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    with torch.no_grad(), steered(hf, interventions, prompt_lengths=[prompt]):
        handle = hf.model.layers[layer].register_forward_hook(hook)
        hf(input_ids=torch.tensor([ids]), use_cache=False)
        handle.remove()
    return found[-1]


def test_operations_do_what_the_table_says(hf: tuple[Any, Any]) -> None:
    ids, layer = list(range(5, 25)), 3
    vector = random_vector(PRINT, (layer,), 2.5)
    v = torch.from_numpy(vector.directions[layer])
    plain = at_layer(hf[0], ids, layer, [], 12)
    before = plain @ v

    def component(**settings: Any) -> torch.Tensor:
        return at_layer(hf[0], ids, layer, [Intervention(vector, **settings)], 12) @ v

    torch.testing.assert_close(component(strength=0.8), before + 0.8 * 2.5, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(component(op="ablate"), torch.zeros(20), rtol=0, atol=1e-3)
    torch.testing.assert_close(component(op="ablate", strength=0.25), 0.75 * before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(component(op="clamp", strength=-1.2), torch.full((20,), -3.0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(component(op="reflect", strength=9.0), -before, rtol=1e-3, atol=1e-3)
    kept = at_layer(hf[0], ids, layer, [Intervention(vector, 3.0, preserve_norm=True)], 12)
    torch.testing.assert_close(kept.norm(dim=-1), plain.norm(dim=-1), rtol=1e-4, atol=1e-4)
    moved = plain + 7.5 * v
    torch.testing.assert_close(kept, moved * (plain.norm(dim=-1) / moved.norm(dim=-1))[:, None], rtol=1e-3, atol=1e-3)


def test_projections_are_taken_before_anything_is_applied(hf: tuple[Any, Any]) -> None:
    ids, layer = list(range(5, 25)), 3
    one, two = random_vector(PRINT, (layer,), 1.0, 1), random_vector(PRINT, (layer,), 1.0, 2)
    u, w = (torch.from_numpy(x.directions[layer]) for x in (one, two))
    plain = at_layer(hf[0], ids, layer, [], 12)
    both = [Intervention(one, 2.0), Intervention(two, op="ablate"), Intervention(one, op="clamp", strength=0.5)]
    expected = plain + 2.0 * u - (plain @ w)[:, None] * w + (0.5 - plain @ u)[:, None] * u
    for order in (both, both[::-1]):
        torch.testing.assert_close(at_layer(hf[0], ids, layer, order, 12), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "covered"),
    [
        ("all", range(20)),
        ("prompt", range(12)),
        ("generated", range(12, 20)),
        ("last_prompt", [11]),
        ((3, 6), [3, 4, 5]),
        ((-2, None), range(10, 20)),
        ((-5, -2), [7, 8, 9]),
        ((15, None), range(15, 20)),
        ((0, -8), range(4)),
    ],
)
def test_scopes_cover_their_positions(hf: tuple[Any, Any], tokens: Any, covered: Any) -> None:
    ids, layer = list(range(5, 25)), 3
    vector = random_vector(PRINT, (layer,), 2.0)
    plain = at_layer(hf[0], ids, layer, [], 12)
    moved = at_layer(hf[0], ids, layer, [Intervention(vector, tokens=tokens)], 12)
    changed = (moved - plain).norm(dim=-1) > 0.5
    assert torch.nonzero(changed).flatten().tolist() == list(covered)
    low, high = positions_of(parse_scope(tokens), 12)
    assert list(range(low, min(high, 20))) == list(covered)


def test_a_gate_opens_on_the_probe_of_the_plain_prompt(hf: tuple[Any, Any]) -> None:
    ids, layer = list(range(5, 25)), 3
    probe, vector = random_vector(PRINT, (2,), 1.0, 5), random_vector(PRINT, (layer,), 2.0)
    value = float(at_layer(hf[0], ids, 2, [], 12)[11] @ torch.from_numpy(probe.directions[2]))
    plain = at_layer(hf[0], ids, layer, [], 12)
    ungated = at_layer(hf[0], ids, layer, [Intervention(vector)], 12)
    other = Intervention(
        random_vector(PRINT, (1,), 9.0, 3), 1.0
    )  # changes what the probe's layer would read if it were not plain
    for threshold, above, is_open in (
        (value - 0.1, True, True),
        (value + 0.1, True, False),
        (value + 0.1, False, True),
        (value - 0.1, False, False),
    ):
        gated = Intervention(vector, when=Gate(probe, threshold, above=above))
        torch.testing.assert_close(at_layer(hf[0], ids, layer, [gated], 12), ungated if is_open else plain)
        together = at_layer(hf[0], ids, layer, [gated, other], 12)
        alone = at_layer(hf[0], ids, layer, [Intervention(vector), other] if is_open else [other], 12)
        torch.testing.assert_close(together, alone)


def test_json_form_and_hash_round_trip() -> None:
    vector, probe = random_vector(PRINT, (1, 3, 5), 2.0), random_vector(PRINT, (2,), 1.0, 7)
    by_hash = {v.hash: v for v in (vector, probe)}
    for one in (
        Intervention(vector),
        Intervention(vector, -0.5, "ablate", (5, 1), (-3, None), True, Gate(probe, 0.25, above=False)),
        Intervention(vector, 2, "clamp", [3], "last_prompt"),  # type: ignore[arg-type]
        Intervention(vector, 7.0, "reflect", tokens=(2, 9)),
    ):
        again = Intervention.from_record(json.loads(json.dumps(one.record())), by_hash.__getitem__)
        assert again == one
        assert again.hash == one.hash
        assert again.record() == one.record()
    same = [Intervention(vector, 1, layers=(3, 1)), Intervention(vector, 1.0, layers=(1, 3), tokens=(0, None))]
    assert same[0].hash == same[1].hash, "one canonical form"
    assert Intervention(vector, 1.0, "reflect").hash == Intervention(vector, 3.0, "reflect").hash
    a, b = Intervention(vector, 1.0), Intervention(vector, 2.0)
    assert hash_of([a, b]) == hash_of([b, a]) != hash_of([a])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"op": "multiply"}, "op"),
        ({"op": ["add"]}, "op"),
        ({"strength": "much"}, "strength"),
        ({"strength": True}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"strength": 1e300}, "strength"),
        ({"layers": []}, "layers"),
        ({"layers": [2]}, "layers"),
        ({"layers": 1}, "layers"),
        ({"layers": [1.0]}, "layers"),
        ({"layers": [True]}, "layers"),
        ({"tokens": "some"}, "tokens"),
        ({"tokens": [3]}, "tokens"),
        ({"tokens": [5, 2]}, "tokens"),
        ({"tokens": [-1, -1]}, "tokens"),
        ({"tokens": [1, 0]}, "tokens"),
        ({"tokens": [1.5, 3]}, "tokens"),
        ({"tokens": {"a": 1}}, "tokens"),
        ({"preserve_norm": 1}, "preserve_norm"),
        ({"when": 3}, "when"),
        ({"when": {}}, "when.vector"),
        ({"when": {"vector": "v", "layer": 9}}, "when.layers"),
        ({"when": {"vector": "v"}}, "when.layer"),
        ({"when": {"vector": "v", "layer": 1, "threshold": None}}, "when.threshold"),
        ({"when": {"vector": "v", "layer": 1, "above": "yes"}}, "when.above"),
        ({"speed": 3}, "speed"),
    ],
)
def test_bad_fields_are_named(change: dict[str, Any], field: str) -> None:
    vector = random_vector(PRINT, (1, 3), 2.0)
    with pytest.raises(InterventionError) as found:
        parse([{"vector": "v"}, {"vector": "v"} | change], lambda _: vector)
    assert found.value.field == f"steering[1].{field}"


def test_bad_lists_are_named() -> None:
    vector = random_vector(PRINT, (1, 3), 2.0)
    for given, says in (
        ("{", "not JSON"),
        ({"vector": "v"}, "is a list"),
        (["v"], "is an object"),
        ([{}], '"vector" is missing'),
        ([{"vector": "v"}] * 65, "at most 64"),
        ("[" * 100_000, "not JSON"),
    ):
        with pytest.raises(InterventionError, match=says):
            parse(given, lambda _: vector)


def test_absurd_strengths_stay_finite(hf: tuple[Any, Any]) -> None:
    vector = random_vector(PRINT, tuple(range(8)), 1e6)
    for op in ("add", "ablate", "clamp"):
        with torch.no_grad(), steered(hf[0], [Intervention(vector, 1e6, op)]):
            logits = hf[0](input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits
        assert torch.isfinite(logits).all()


def test_vectors_are_equal_by_content() -> None:
    a, b = random_vector(PRINT, (1,), 2.0), random_vector(PRINT, (1,), 2.0)
    assert a == b
    assert len({a, b}) == 1
    assert a != random_vector(PRINT, (1,), 2.1)
    assert not np.array_equal(random_vector(PRINT, (1,), 2.0, 1).directions[1], a.directions[1])
