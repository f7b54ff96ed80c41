"""Arithmetic of vectors, GGUF control vectors, and the commands that look after vector files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steer import pocket
from steer.arithmetic import cosines, step
from steer.errors import VectorError
from steer.fingerprint import Fingerprint
from steer.vector import SteeringVector
from tests.conftest import random_vector
from tests.test_cli import run

MODEL = Fingerprint("qwen3", "c", "w", width=32)


def pair() -> tuple[SteeringVector, SteeringVector]:
    return random_vector(MODEL, (1, 2, 3), 2.0, 0), random_vector(MODEL, (2, 3, 4), 3.0, 1)


def test_sums_differences_and_multiples_are_those_of_the_steps() -> None:
    a, b = pair()
    for made, expected in (
        (a + b, lambda n: step(a, n) + step(b, n)),
        (a - b, lambda n: step(a, n) - step(b, n)),
    ):
        assert made.layers == [2, 3]
        for n in made.layers:
            np.testing.assert_allclose(step(made, n), expected(n), atol=1e-5)
            assert np.linalg.norm(made.directions[n]) == pytest.approx(1, abs=1e-6)
            assert made.separation[n] > 0
    for factor in (2.5, -0.5):
        made = factor * a
        for n in a.layers:
            np.testing.assert_allclose(step(made, n), factor * step(a, n), atol=1e-5)
    assert (-a).poles == (a.poles[1], a.poles[0])
    np.testing.assert_allclose(step(-1.0 * (-a), 1), step(a, 1), atol=1e-5)


def test_the_orthogonal_part_has_nothing_of_the_other() -> None:
    a, b = pair()
    made = a.orthogonal(b)
    for n in made.layers:
        assert abs(made.directions[n] @ b.directions[n]) < 1e-5
        rest = step(a, n) - step(made, n)
        assert abs(rest @ b.directions[n]) == pytest.approx(float(np.linalg.norm(rest)), rel=1e-4)


def test_lineage_is_kept_through_the_file(tmp_path: Path) -> None:
    a, b = pair()
    made = 2.0 * (a + b) - b
    again = SteeringVector.load(made.save(tmp_path / "v.safetensors"))
    assert again == made
    assert again.lineage == made.lineage
    inner = again.lineage["of"][0]["lineage"]
    assert (again.lineage["op"], inner["op"], inner["factor"]) == ("difference", "multiple", 2.0)
    assert [p["hash"] for p in inner["of"][0]["lineage"]["of"]] == [a.hash, b.hash]
    assert not again.scores, "nobody has seen how well it holds"


def test_what_cannot_be_combined_is_refused() -> None:
    a, b = pair()
    other = random_vector(Fingerprint("llama", "c", "w", width=32), (1, 2), 1.0, 2)
    with pytest.raises(VectorError, match="different models: architecture"):
        _ = a + other
    with pytest.raises(VectorError, match="different models: width"):
        _ = a + random_vector(Fingerprint(width=16), (1, 2), 1.0, 2)
    with pytest.raises(VectorError, match="no layer in common"):
        _ = a + random_vector(MODEL, (7,), 1.0, 3)
    with pytest.raises(VectorError, match="zero at every layer"):
        _ = a - a
    with pytest.raises(VectorError, match="is no vector"):
        _ = a * 0
    with pytest.raises(VectorError, match="no direction at layer 1"):
        cosines([a, b], 1)


def test_cosines() -> None:
    a, b = pair()
    matrix = cosines([a, b, -a], 2)
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-6)
    assert matrix[0, 2] == pytest.approx(-1, abs=1e-6)
    assert matrix[0, 1] == pytest.approx(float(a.directions[2] @ b.directions[2]), abs=1e-6)


def test_gguf_there_and_back(tmp_path: Path) -> None:
    vector = SteeringVector.load(pocket.VECTORS / "accept.safetensors").without(0, 1, 2)
    again = SteeringVector.load(vector.save(tmp_path / "v.gguf"), model=pocket.MODEL)
    assert again.metadata() == vector.metadata()
    for n in vector.layers:
        np.testing.assert_allclose(again.directions[n], vector.directions[n], atol=1e-6)
        assert again.separation[n] == vector.separation[n]
    whole = SteeringVector.load(pocket.VECTORS / "accept.safetensors")
    assert whole.separation[1] == 0, "before the first attention layer nothing is known of the contrast"
    assert SteeringVector.load(whole.save(tmp_path / "w.gguf")).layers == [3, 4, 5, 6, 7], "there is no step to write"
    with pytest.raises(VectorError, match="direction at layer 0"):
        random_vector(MODEL, (0, 1), 1.0).save(tmp_path / "x.gguf")


def test_a_control_vector_in_repengs_format(tmp_path: Path) -> None:
    """Its file as repeng 0.4 writes it: the step of each layer, an architecture and a hint; read by key and value."""
    from gguf import GGUFReader, GGUFWriter

    steps = {n: np.random.default_rng(n).standard_normal(16).astype(np.float32) for n in (1, 2, 5)}
    writer = GGUFWriter(str(tmp_path / "r.gguf"), "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 3)
    for n, values in steps.items():
        writer.add_tensor(f"direction.{n}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    vector = SteeringVector.load(tmp_path / "r.gguf")
    assert vector.selected == (1, 2, 5), "a control vector acts at all its layers"
    for n, values in steps.items():
        np.testing.assert_allclose(step(vector, n), values, atol=1e-5)
    with pytest.raises(VectorError, match="another model"):
        SteeringVector.load(tmp_path / "r.gguf", model=pocket.MODEL)

    ours = GGUFReader(str(vector.save(tmp_path / "o.gguf")))
    assert {t.name for t in ours.tensors} == {"direction.1", "direction.2", "direction.5"}
    for tensor in ours.tensors:
        np.testing.assert_allclose(tensor.data, steps[int(tensor.name.split(".")[1])], atol=1e-5)
    (tmp_path / "junk.gguf").write_bytes(b"GGUFjunk")
    with pytest.raises(VectorError, match=r"junk\.gguf: not a readable GGUF"):
        SteeringVector.load(tmp_path / "junk.gguf")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accept, formal = (str(pocket.VECTORS / f"{name}.safetensors") for name in ("accept", "formal"))
    code, out, _ = run(capsys, "vectors", "list", str(pocket.VECTORS))
    assert code == 0
    assert all(name in out for name in pocket.BEHAVIOURS)
    code, out, _ = run(capsys, "vectors", "show", accept)
    assert "← selected" in out
    assert SteeringVector.load(accept).hash in out
    code, out, _ = run(capsys, "vectors", "compare", accept, formal, "--layer", "5", "--plot", str(tmp_path / "c.png"))
    assert code == 0
    assert "1.000" in out
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "vectors", "convert", accept, str(tmp_path / "a.gguf"))
    assert code == 0
    assert "no layer without a step: 0, 1, 2" in out
    code, out, _ = run(capsys, "vectors", "convert", str(tmp_path / "a.gguf"), str(tmp_path / "a.safetensors"))
    assert code == 0
    assert SteeringVector.load(tmp_path / "a.safetensors").layers == [3, 4, 5, 6, 7]
    for arguments, says in (
        (["convert", accept, str(tmp_path / "a.gguf")], "there is a file already"),
        (["convert", accept, str(tmp_path / "a.txt")], "ends in .safetensors or .gguf"),
        (["compare", accept], "at least two"),
        (["compare", accept, formal, "--plot", str(tmp_path / "d.png")], "name it with --layer"),
        (["compare", accept, formal, "--layer", "99"], "no direction at layer 99"),
        (["list", str(tmp_path / "none")], "no such folder"),
        (["show", str(tmp_path / "none")], "no such vector file"),
    ):
        code, _, error = run(capsys, "vectors", *arguments)
        assert (code, says in error) == (2, True), (arguments, error)
