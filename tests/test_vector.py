"""The vector file: round trip, refusal of other models with the field named, broken files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from steer import pocket
from steer.errors import InterventionError, ModelError, VectorError
from steer.fingerprint import Fingerprint, fingerprint
from steer.intervention import Intervention, hash_of
from steer.vector import Score, SteeringVector
from tests.conftest import make_model, random_vector


def test_round_trip(tmp_path: Path, pocket_print: Fingerprint) -> None:
    vector = replace(
        random_vector(pocket_print, (2, 5), 3.5), scores={2: Score(0.9, 0.8, 0.95, 40)}, selected=(5,),
        poles=("up", "down"), read="response_last", residual_norm={2: 7.0}, pairs_hash="p", split_hashes={"fit": "f"},
    )  # fmt: skip
    again = SteeringVector.load(vector.save(tmp_path / "v.safetensors"), model=pocket.MODEL)
    for layer in (2, 5):
        assert np.array_equal(again.directions[layer], vector.directions[layer])
    assert replace(again, directions=vector.directions) == vector
    assert again.hash == vector.hash


def test_another_models_vector_is_refused_and_the_field_named(tmp_path: Path, pocket_print: Fingerprint) -> None:
    other = make_model("qwen3", tmp_path / "m")
    path = random_vector(pocket_print, (2,), 1.0).save(tmp_path / "v.safetensors")
    with pytest.raises(VectorError, match="architecture is qwen3_5_text, the model's is qwen3"):
        SteeringVector.load(path, model=other)
    changed = random_vector(replace(pocket_print, weights="0" * 64), (2,), 1.0).save(tmp_path / "w.safetensors")
    with pytest.raises(VectorError, match="weights is 0000"):
        SteeringVector.load(changed, model=pocket.MODEL)
    assert SteeringVector.load(changed, model=pocket.MODEL, allow_mismatch=True).mismatch_allowed
    with pytest.raises(VectorError):  # the width must fit all the same
        SteeringVector.load(path, model=other, allow_mismatch=True)


def test_fingerprint_is_the_same_for_folder_and_loaded_model(hf: tuple[Any, Any], pocket_print: Fingerprint) -> None:
    mine = fingerprint(hf[0])
    assert (mine.weights, mine.config, mine.architecture) == (
        pocket_print.weights,
        pocket_print.config,
        pocket_print.architecture,
    )
    with pytest.raises(ModelError, match="no such model"):
        fingerprint("/nowhere/at/all")


def test_broken_files(tmp_path: Path, pocket_print: Fingerprint) -> None:
    with pytest.raises(VectorError, match="no such vector file"):
        SteeringVector.load(tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"not a vector at all")
    with pytest.raises(VectorError, match="not a readable vector file"):
        SteeringVector.load(tmp_path / "junk.safetensors")
    save_file({"layers.1": np.ones(4, np.float32)}, str(tmp_path / "plain.safetensors"))
    with pytest.raises(VectorError, match='lacks "steer"'):
        SteeringVector.load(tmp_path / "plain.safetensors")
    with pytest.raises(VectorError, match="no such folder"):
        random_vector(pocket_print, (1,), 1.0).save(tmp_path / "none" / "v.safetensors")
    with pytest.raises(VectorError, match="has norm 2"):
        SteeringVector({0: np.array([2.0, 0.0], np.float32)}, {0: 1.0}, pocket_print)


def test_interventions_check_themselves_and_hash_canonically(pocket_print: Fingerprint) -> None:
    a, b = random_vector(pocket_print, (1, 2), 1.0, 1), random_vector(pocket_print, (1,), 1.0, 2)
    assert hash_of([Intervention(a), Intervention(b)]) == hash_of([Intervention(b), Intervention(a)])
    assert Intervention(a, layers=(2, 1)).hash == Intervention(a).hash
    assert Intervention(a, 1.0).hash != Intervention(a, 1.5).hash
    assert Intervention(a.select(2)).at == (2,)
    wrongs: tuple[dict[str, Any], ...] = (
        {"op": "twist"},
        {"tokens": "some"},
        {"strength": float("nan")},
        {"layers": (7,)},
        {"layers": ()},
    )
    for wrong in wrongs:
        with pytest.raises(InterventionError):
            Intervention(a, **wrong)
