"""The canary: before an engine is handed out, it proves through the real graph that steering works and that none is none.

A random direction at a middle layer, greedy, a few tokens with log-probabilities: strength 0 must give exactly the
plain numbers, strength ≠ 0 must give others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from steer.errors import RefusedError
from steer.intervention import Intervention
from steer.vector import SteeringVector

if TYPE_CHECKING:
    from steer.engine.engine import Engine

TOKENS = 3


def check(engine: Engine) -> None:
    """Run the canary.

    Raises:
        RefusedError: steering has no effect, or an effect at strength 0.
    """
    width = engine.fingerprint.width
    direction = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    direction /= np.linalg.norm(direction)
    layer = engine.layers // 2
    vector = SteeringVector({layer: direction}, {layer: float(np.sqrt(width))}, engine.fingerprint, name="canary")
    prompt = list(range(min(8, engine.tokenizer.vocab_size)))

    def run(interventions: list[Intervention]) -> list[dict[int, float]]:
        answer = engine.generate([prompt], interventions, max_tokens=TOKENS, temperature=0.0, logprobs=5)
        return answer[0].logprobs

    plain, zero, full = run([]), run([Intervention(vector, 0.0)]), run([Intervention(vector, 1.0)])
    if zero != plain:
        raise RefusedError("canary: strength 0 does not equal the unsteered model, so the engine is not handed out")
    if full == plain:
        raise RefusedError("canary: steering has no effect in the compiled graph, so the engine is not handed out")
