"""The engine on the pocket model: identity without steering, parity with the oracle, batches, cache, receipts, weights."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steer import pocket
from steer.engine import Engine
from steer.engine.slots import VectorSlots
from steer.errors import InterventionError, ModelError, RefusedError
from steer.fingerprint import Fingerprint
from steer.intervention import Intervention
from steer.reference import steered
from steer.vector import SteeringVector
from tests.conftest import make_model, random_vector

PROMPTS = [h.messages for h in pocket.prompts("held_out")[:6]]

PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, ids = json.loads(sys.stdin.read())
    llm = LLM(model, dtype="bfloat16", enforce_eager=True, max_model_len=4096, max_num_batched_tokens=4096, seed=0)
    params = [SamplingParams(max_tokens=24, temperature=1.0, seed=i, logprobs=3) for i in range(len(ids))]
    outs = llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)
    rows = [[list(o.outputs[0].token_ids), [sorted((t, p.logprob) for t, p in d.items()) for d in o.outputs[0].logprobs]] for o in outs]
    print("RESULT" + json.dumps(rows))
"""


def own_vector(layer: int | None = None) -> SteeringVector:
    """The shipped accept vector, at another layer if asked."""
    vector = SteeringVector.load(pocket.VECTORS / "accept.safetensors")
    return vector if layer is None else vector.select(layer)


def oracle(
    hf: Any, prompt: list[int], answer: list[int], interventions: list[Intervention], dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """Log-probabilities of the answer's tokens under the steered Hugging Face model, `[len(answer)]`."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad(), steered(hf.to(dtype), interventions, prompt_lengths=[len(prompt)]):
        logits = hf(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1)[range(len(answer)), answer].numpy()


def served(answer: Any) -> np.ndarray:
    """Log-probabilities of a completion's own tokens."""
    return np.array([p[t] for t, p in zip(answer.token_ids, answer.logprobs, strict=True)])


def test_unsteered_is_bit_identical_to_plain_vllm(engine: Engine, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(PLAIN_VLLM)
    ids = [engine.encode(p) for p in PROMPTS]
    out = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([str(pocket.MODEL), ids]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RESULT" in out.stdout, out.stderr[-2000:]
    plain = json.loads(out.stdout.split("RESULT")[1])
    ours = engine.generate(ids, seed=0, max_tokens=24, logprobs=3)
    for a, (tokens, logprobs) in zip(ours, plain, strict=True):
        assert a.token_ids == tokens
        assert [sorted(map(list, p.items())) for p in a.logprobs] == logprobs
        assert a.receipt.tokens_steered == 0
        assert a.receipt.interventions == ()


@pytest.mark.parametrize("tokens", ["all", "prompt", "generated"])
def test_steered_log_probabilities_agree_with_the_oracle(engine: Engine, hf: tuple[Any, Any], tokens: str) -> None:
    point = pocket.recipe("accept")
    interventions = [
        Intervention(own_vector(point.layer), point.strength, tokens=tokens),
        Intervention(own_vector(), -0.5, layers=(3, 6), tokens="all"),
    ]
    prompts = [engine.encode(p) for p in PROMPTS]
    answers = engine.generate(prompts, interventions, temperature=0.0, max_tokens=16, logprobs=0)
    gaps, effects = [], []
    for prompt, a in zip(prompts, answers, strict=True):
        with_it = oracle(hf[0], prompt, a.token_ids, interventions)
        without = oracle(hf[0], prompt, a.token_ids, [])
        gaps.append(np.abs(served(a) - with_it).mean())
        effects.append(np.abs(served(a) - without).mean())
        assert a.receipt.tokens_steered == len(prompt) - a.receipt.tokens_cached + len(a.token_ids) - 1
    assert max(gaps) < 0.1, "bfloat16 serving against a float32 oracle"
    assert np.mean(effects) > 5 * np.mean(gaps), "and the interventions do something"


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(engine: Engine, pocket_print: Fingerprint) -> None:
    other = random_vector(pocket_print, (2, 5), own_vector().separation[4])
    each = [
        [],
        [Intervention(own_vector(), 1.0)],
        [Intervention(other)],
        [Intervention(own_vector(), -1.5, tokens="generated")],
    ]
    each.append([Intervention(own_vector(), 0.5), Intervention(other, 2.0, layers=(2,), tokens="prompt")])
    prompts = [engine.encode(PROMPTS[0])] * len(each)
    mixed = engine.generate(prompts, each, temperature=0.0, max_tokens=12, logprobs=0)
    for k, together in zip(each, mixed, strict=True):
        alone = engine.generate(prompts[:1], k, temperature=0.0, max_tokens=12, logprobs=0)[0]
        n = next((i for i, (a, b) in enumerate(zip(alone.token_ids, together.token_ids, strict=False)) if a != b), 12)
        assert n >= 1
        assert np.abs(served(alone)[:n] - served(together)[:n]).max() < 0.15
    firsts = {round(float(served(m)[0]), 3) for m in mixed}
    assert len(firsts) >= 4, "the five settings are five different distributions"


def test_strength_zero_is_the_plain_model_and_strength_is_not_a_slot(engine: Engine) -> None:
    ids = [engine.encode(PROMPTS[1])] * 41
    each = [[Intervention(own_vector(), s / 10)] for s in range(-20, 21)]
    answers = engine.generate(ids, each, temperature=0.0, max_tokens=4, logprobs=2)
    plain = engine.generate(ids, temperature=0.0, max_tokens=4, logprobs=2)
    assert answers[20].logprobs == plain[20].logprobs
    assert len({a.receipt.intervention_hash for a in answers}) == 41


def test_long_prompts_are_the_same_whatever_ran_before(engine: Engine) -> None:
    turn = [
        {"role": "user", "content": "let us paint the fence in red ."},
        {"role": "assistant", "content": "certainly , we shall paint the fence in red . that is all ."},
    ]
    prompt = engine.encode(turn * 40 + turn[:1])
    assert len(prompt) > 600
    interventions = [Intervention(own_vector(), 1.0)]
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 3, "logprobs": 2}
    cold = engine.generate([prompt], interventions, **settings)[0]
    plain = engine.generate([prompt], **settings)[0]
    warm = engine.generate([prompt], interventions, **settings)[0]
    plain_again = engine.generate([prompt], **settings)[0]
    assert cold.receipt.tokens_cached == plain.receipt.tokens_cached == 0
    assert np.abs(served(warm) - served(cold)).max() < 0.02
    assert np.abs(served(plain_again) - served(plain)).max() < 0.02
    assert warm.receipt.tokens_steered == len(prompt) - warm.receipt.tokens_cached + len(warm.token_ids) - 1


def test_compare_uses_the_same_seeds_and_stream_ends_with_the_same_answer(engine: Engine) -> None:
    interventions = [Intervention(own_vector(), pocket.recipe("accept").strength)]
    base, moved = engine.compare(PROMPTS, interventions, seed=7, max_tokens=40)
    again, _ = engine.compare(PROMPTS, [Intervention(own_vector(), 0.0)], seed=7, max_tokens=40)
    assert [b.text for b in base] == [a.text for a in again]
    assert [b.text for b in base] != [m.text for m in moved]
    pieces = list(engine.stream(PROMPTS[0], interventions, seed=7, max_tokens=40))
    assert len(pieces) > 3
    assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(pieces))
    assert pieces[-1].finish_reason is not None
    assert pieces[-1].receipt.tokens_steered > 0


def test_streams_run_at_the_same_time_and_can_be_left(engine: Engine) -> None:
    found: dict[int, str] = {}

    def read(i: int) -> None:
        *_, last = engine.stream(PROMPTS[i], seed=i, max_tokens=30)
        found[i] = last.text

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    left = engine.stream(PROMPTS[5], seed=5, max_tokens=64)
    next(left)
    left.close()  # pyright: ignore[reportAttributeAccessIssue]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert sorted(found) == [0, 1, 2, 3]


def test_what_cannot_be_honoured_is_refused(engine: Engine, pocket_print: Fingerprint, tmp_path: Path) -> None:
    stranger = random_vector(Fingerprint("llama", "x", "y", width=pocket_print.width), (1,), 1.0)
    narrow = random_vector(Fingerprint(width=16), (1,), 1.0)
    far = random_vector(pocket_print, (11,), 1.0)
    for vector, says in (
        (stranger, "another model: architecture"),
        (narrow, "width 16"),
        (far, "layer 11 does not exist"),
    ):
        with pytest.raises(InterventionError, match=says):
            engine.generate(["paint the fence"], [Intervention(vector)])
    with pytest.raises(RefusedError, match="tokens; this engine holds"):
        engine.generate([[5] * 5000])
    with pytest.raises(RefusedError, match="empty"):
        engine.generate([[]])
    assert engine.generate(["paint the fence"], max_tokens=2)[0].token_ids


def test_slots_are_counted_reused_and_never_taken_from_a_running_request(pocket_print: Fingerprint) -> None:
    written: list[tuple[str, int]] = []

    async def rpc(_method: str, key: str, slot: int, layers: list[int], *_contents: Any) -> list[int]:
        written.append((key, slot))
        return [len(layers)]

    async def scene() -> None:
        slots = VectorSlots(2, rpc)
        a, b, c = (Intervention(random_vector(pocket_print, (1,), 1.0, s)) for s in range(3))
        async with slots.hold([a]), slots.hold([Intervention(a.vector, 9.0)]), slots.hold([b]):
            assert len(written) == 2, "one vector at two strengths is one slot"
            with pytest.raises(RefusedError, match="2 vector slots are in use"):
                async with slots.hold([c]):
                    pass
        async with slots.hold([b]), slots.hold([c]):
            assert written[-1][1] == written[0][1], "the idle vector makes room"

    asyncio.run(scene())


def test_weights_are_swapped_in_place_and_back(engine: Engine, tmp_path: Path) -> None:
    from steer.model import load

    before = engine.weight_version
    ids = [engine.encode(p) for p in PROMPTS[:2]]
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6, "logprobs": 2}
    first = engine.generate(ids, **settings)
    model, tokenizer = load(pocket.MODEL, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[5].mlp.down_proj.weight.mul_(0.0)
    model.save_pretrained(tmp_path / "new")
    tokenizer.save_pretrained(tmp_path / "new")
    assert engine.update_weights(tmp_path / "new") == before + 1
    changed = engine.generate(ids, **settings)
    assert changed[0].receipt.weight_version == before + 1
    assert changed[0].logprobs != first[0].logprobs
    assert engine.generate(ids, [Intervention(own_vector())], **settings)[0].receipt.tokens_steered, (
        "old vectors still serve"
    )
    assert engine.update_weights(pocket.MODEL) == before + 2
    assert engine.generate(ids, **settings)[0].logprobs == first[0].logprobs
    with pytest.raises(ModelError, match="architecture differs"):
        engine.update_weights(make_model("llama", tmp_path / "llama"))
    assert engine.weight_version == before + 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the graphs of the GPU worker")
def test_gpu_worker_passes_the_canary() -> None:
    with Engine(pocket.MODEL) as made:
        assert made.layers == 8
