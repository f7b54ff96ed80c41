"""Other families through the same engine: a compiled Llama, a Qwen3 with chunked prompts. Each starts an engine of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer.engine import Engine
from steer.errors import ModelError
from steer.fingerprint import fingerprint
from steer.intervention import Intervention
from steer.model import load
from tests.conftest import make_model, random_vector
from tests.engine.test_engine import oracle, served


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"eager": False}), ("qwen3", {"eager": True, "max_num_batched_tokens": 64, "max_model_len": 512})],
    ids=["llama-compiled", "qwen3-chunked"],
)
def test_steered_log_probabilities_agree_with_the_oracle(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = make_model(family, tmp_path / family)
    model, tokenizer = load(path)
    vector = random_vector(fingerprint(path), (1, 2), 6.0)
    each = [
        [],
        [Intervention(vector, 1.0)],
        [Intervention(vector, -0.7, layers=(2,), tokens="prompt")],
        [Intervention(vector, 1.3, layers=(1,), tokens="generated"), Intervention(vector, 0.4, tokens="prompt")],
    ]
    texts = ["paint the fence in red . " * n for n in (2, 30, 25, 7)]
    prompts = [tokenizer(t)["input_ids"] for t in texts]
    with Engine(path, **options) as engine:
        answers = engine.generate(prompts, each, temperature=0.0, max_tokens=8, logprobs=0)
        check_prefix_cache(
            engine, tokenizer("paint the fence in red . " * 60)["input_ids"], [Intervention(vector, 0.9)]
        )
    for prompt, k, a in zip(prompts, each, answers, strict=True):
        gap = np.abs(served(a) - oracle(model, prompt, a.token_ids, k)).max()
        assert gap < 0.08
        if k:
            assert np.abs(served(a) - oracle(model, prompt, a.token_ids, [])).max() > 4 * gap


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
