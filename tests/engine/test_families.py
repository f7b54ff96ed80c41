"""Other families through the same engine: a compiled Llama, a Qwen3 with chunked prompts. Each starts an engine of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer.capture import capture
from steer.engine import Engine
from steer.errors import ModelError, RefusedError
from steer.fingerprint import fingerprint
from steer.intervention import Intervention
from steer.model import load
from steer.pairs import Rendered
from steer.reference import steered
from tests.conftest import make_model, random_vector
from tests.engine.test_engine import oracle, served

TENSOR_PARALLEL = {"eager": True, "tensor_parallel_size": 2}
CHUNKED = {"eager": True, "max_num_batched_tokens": 64, "max_model_len": 512}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"eager": False}),
        ("qwen3", CHUNKED),
        ("gemma3", {"eager": True}),
        ("qwen3-moe", {"eager": True}),
        ("qwen3-next", {"eager": True}),
        ("qwen3", TENSOR_PARALLEL),
    ],
    ids=["llama-compiled", "qwen3-chunked", "gemma3", "qwen3-moe", "qwen3-next", "qwen3-tensor-parallel"],
)
def test_steering_and_capture_agree_with_hugging_face(
    family: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options is TENSOR_PARALLEL:  # both workers on one NUMA node, one core each
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            pytest.skip("needs two cores: one for each tensor-parallel worker")
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    path = make_model(family, tmp_path / family)
    model, tokenizer = load(path)
    vector = random_vector(fingerprint(path), (1, 2), 6.0)
    each = [
        [],
        [Intervention(vector, 1.0)],
        [Intervention(vector, -0.7, layers=(2,), tokens="prompt")],
        [Intervention(vector, 1.3, layers=(1,), tokens="generated"), Intervention(vector, 0.4, tokens="prompt")],
        [Intervention(vector, 0.8, "ablate", preserve_norm=True), Intervention(vector, 2.0, "clamp", (2,), (-9, None))],
    ]
    texts = ["paint the fence in red . " * n for n in (2, 30, 25, 7, 21)]
    prompts = [tokenizer(t)["input_ids"] for t in texts]
    with Engine(path, **options) as engine:
        answers = engine.generate(prompts, each, temperature=0.0, max_tokens=8, logprobs=0)
        if family != "qwen3-next":  # vLLM caches whole blocks of a hybrid model only, longer than this prompt
            long = tokenizer("paint the fence in red . " * 60)["input_ids"]
            check_prefix_cache(engine, long, [Intervention(vector, 0.9)])
        items = [Rendered(p, len(p) - 4) for p in prompts]
        for read in ("last_prompt", "response_mean", -2):
            served_, ours = engine.capture(items, read=read), capture(model, items, read=read)
            for layer in range(4):
                error = np.linalg.norm(served_[layer] - ours[layer], axis=1) / np.linalg.norm(ours[layer], axis=1)
                assert error.max() < 0.03, (read, layer)
        moved = engine.capture(items, [1, 3], "response_mean", each[4])
    for row, item in enumerate(items):
        with steered(model, each[4], prompt_lengths=[len(item.ids)]):
            ours = capture(model, [item], [1, 3], "response_mean")
        for layer in (1, 3):
            assert np.linalg.norm(moved[layer][row] - ours[layer][0]) < 0.04 * np.linalg.norm(ours[layer][0])
    for prompt, k, a in zip(prompts, each, answers, strict=True):
        gap = np.abs(served(a) - oracle(model, prompt, a.token_ids, k)).max()
        assert gap < 0.08
        if k:
            assert np.abs(served(a) - oracle(model, prompt, a.token_ids, [])).max() > 4 * gap


def test_pipeline_parallelism_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="pipeline parallelism"):
        Engine(make_model("qwen3", tmp_path / "m"), eager=True, pipeline_parallel_size=2)


def check_prefix_cache(engine: Engine, prompt: list[int], interventions: list[Intervention]) -> None:
    """Equal settings share blocks, others never do, and the answers are those of a cold cache."""
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 3, "logprobs": 2}
    cold, plain, warm, plain_again = (
        engine.generate([prompt], k, **settings)[0] for k in (interventions, [], interventions, [])
    )
    assert cold.receipt.tokens_cached == plain.receipt.tokens_cached == 0
    assert warm.receipt.tokens_cached >= 128
    assert plain_again.receipt.tokens_cached >= 128
    assert np.abs(served(warm) - served(cold)).max() < 0.02
    assert np.abs(served(plain_again) - served(plain)).max() < 0.02
    assert warm.receipt.tokens_steered == len(prompt) - warm.receipt.tokens_cached + len(warm.token_ids) - 1


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ModelError, match="/no/such/model: no such model"):
        Engine("/no/such/model")
