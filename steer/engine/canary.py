"""The canary: before the first request is steered, it proves through the real graph that steering works and that none is none.

A random direction at a middle layer, greedy, a few tokens with log-probabilities: strength 0 must give exactly the
plain numbers, strength ≠ 0 must give others.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import numpy as np

from steer.errors import RefusedError
from steer.intervention import Intervention
from steer.vector import SteeringVector

if TYPE_CHECKING:
    from steer.engine.client import SteeringClient

TOKENS = 3


async def check(client: SteeringClient) -> None:
    """Run the canary, on the engine's loop.

    Raises:
        RefusedError: steering has no effect, or an effect at strength 0.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    width = client.fingerprint.width
    direction = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    direction /= np.linalg.norm(direction)
    layer = client.layers // 2
    vector = SteeringVector({layer: direction}, {layer: float(np.sqrt(width))}, client.fingerprint, name="canary")
    ids = list(range(min(8, client.llm.get_tokenizer().vocab_size)))

    async def run(interventions: list[Intervention]) -> list[dict[int, float]]:
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, logprobs=5)
        found: list[dict[int, float]] = []
        prompt = dict(TokensPrompt(prompt_token_ids=ids))
        async for output, _ in client.run(prompt, interventions, params, uuid.uuid4().hex):
            rows = output.outputs[0].logprobs or []
            found = [{t: p.logprob for t, p in row.items()} for row in rows]
        return found

    plain, zero, full = await run([]), await run([Intervention(vector, 0.0)]), await run([Intervention(vector, 1.0)])
    if zero != plain:
        raise RefusedError("canary: strength 0 does not equal the unsteered model, so nothing is steered")
    if full == plain:
        raise RefusedError("canary: steering has no effect in the compiled graph, so nothing is steered")
