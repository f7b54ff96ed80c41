"""The command line: what works, and that bad input is named in one sentence, exits non-zero and changes nothing."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from steer import cli, pocket
from steer.vector import SteeringVector
from tests.conftest import make_model


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_extract_writes_a_vector_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, out = pocket.DATA / "pairs-accept.jsonl", tmp_path / "v.safetensors"
    code, printed, _ = run(
        capsys, "extract", str(pairs), "-o", str(out), "--name", "yes", "--poles", "accepts", "proposes"
    )
    assert code == 0
    assert printed.count("gdn") == 6
    assert "← selected" in printed
    vector = SteeringVector.load(out, model=pocket.MODEL)
    assert (vector.name, vector.poles) == ("yes", ("accepts", "proposes"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["extract", "{tmp}/none.jsonl", "-o", "{tmp}/v"], "none.jsonl: no such pairs file"),
        (["extract", "{tmp}/broken.jsonl", "-o", "{tmp}/v"], 'broken.jsonl:2: "negative" is missing'),
        (["extract", "{tmp}/good.jsonl", "-o", "{tmp}/none/v"], "none: no such folder"),
        (["extract", "{tmp}/good.jsonl", "--model", "{tmp}/nothing", "-o", "{tmp}/v"], "nothing: no such model"),
        (["extract", "{tmp}/good.jsonl", "--method", "magic", "-o", "{tmp}/v"], 'unknown extraction method "magic"'),
        (["extract", "{tmp}/good.jsonl", "--read", "middle", "-o", "{tmp}/v"], 'unknown read position "middle"'),
        (["generate", "hello", "--vector", "{tmp}/none.safetensors"], "none.safetensors: no such vector file"),
        (
            ["generate", "hello", "--model", "{tmp}/other", "--vector", "{accept}"],
            "made on another model: architecture",
        ),
        (["generate", "hello", "--vector", "{accept}", "--op", "sing"], 'unknown op "sing"'),
        (["generate", "hello", "--vector", "{accept}", "--tokens", "[3"], "[3 is not a span"),
        (["generate", "hello", "--steering", "[1]"], "is an object with a vector"),
        (["bench", "steering", "--only", "speed"], 'unknown metric "speed": choose from idle'),
        (["bench", "steering", "--json", "{tmp}/none/f"], "none: no such folder"),
        (["demo", "--behaviour", "brave", "--report", "{tmp}/r"], 'no behaviour "brave"'),
        (["demo", "--report", "{tmp}/good.jsonl/r", "--no-serve"], "the report cannot be written there"),
        (["serve", "{tmp}/nothing"], "nothing: no such model"),
        (["serve", "--port", "{port}"], "cannot listen on 127.0.0.1:{port}"),
        (["demo", "--port", "{port}", "--report", "{tmp}/r"], "cannot listen on 127.0.0.1:{port}"),
    ],
)
def test_bad_input(arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = '{"id": "%s", "positive": "a %s", "negative": "b"}\n'
    (tmp_path / "good.jsonl").write_text("".join(line % (i, i) for i in range(8)))
    (tmp_path / "broken.jsonl").write_text(line % (1, 1) + '{"positive": "a"}\n')
    if any("{tmp}/other" in a for a in arguments):
        make_model("qwen3", tmp_path / "other")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        names = {"tmp": tmp_path, "port": port, "accept": pocket.VECTORS / "accept.safetensors"}
        capsys.readouterr()  # what making the model printed
        code, _, error = run(capsys, *[a.format(**names) for a in arguments])
    assert code == 2
    assert says.format(**names) in error
    assert error.startswith("steer: ")
    assert len(error.strip().splitlines()) == 1
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_import_stays_cheap() -> None:
    import subprocess
    import sys

    code = "import sys, steer; print([m for m in ('torch', 'vllm', 'gradio', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_benchmark_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a tiny model: the figures mean nothing, their form does."""
    out = tmp_path / "f.json"
    code, printed, _ = run(capsys, "bench", "steering", "--small", "--rounds", "1", "--json", str(out))
    assert code == 0
    record = json.loads(out.read_text())
    assert record["name"] == "steering"
    assert set(record["bars"]) == {"idle", "all_layers", "distinct_16", "distinct_64", "stacked_4", "hf_hooks"}
    assert set(record["ratios"]) == set(record["bars"]) | {"ttft_cached", "hf_hooks_batched"}
    assert all(r["low"] <= r["median"] <= r["high"] and r["low"] > 0 for r in record["ratios"].values())
    assert {"command", "versions", "machine"} <= set(record)
    assert "reached" in printed.lower()
