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
    for prompt, k, a in zip(prompts, each, answers, strict=True):
        gap = np.abs(served(a) - oracle(model, prompt, a.token_ids, k)).max()
        assert gap < 0.08
        if k:
            assert np.abs(served(a) - oracle(model, prompt, a.token_ids, [])).max() > 4 * gap


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ModelError, match="/no/such/model: no such model"):
        Engine("/no/such/model")
