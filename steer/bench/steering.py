"""`steer bench steering`: what steering costs.

All arms run in turn in one process, in an order that shifts from round to round; a ratio is taken within a round. Two engines are up at
once, a plain vLLM and ours; the one that waits sleeps. The work is the same everywhere: greedy answers of a fixed length to random
prompts that no cache has seen.

Hugging Face hooks hold one setting for a whole batch. So requests with settings of their own run one after another there (`hf_hooks`); a batch
is possible where all ask for the same (`hf_hooks_batched`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from steer.bench.models import QWEN_0_8B, TINY, random_qwen
from steer.bench.report import BenchReport
from steer.engine import Engine
from steer.engine.plain import PlainVllm
from steer.errors import SteerError
from steer.fingerprint import Fingerprint
from steer.intervention import Intervention
from steer.vector import SteeringVector

BARS = {
    "idle": 0.99,
    "all_layers": 0.97,
    "distinct_16": 0.97,
    "distinct_64": 0.97,
    "stacked_4": 0.93,
    "hf_hooks": 5.0,
}
RATIOS = {  # metric → (arm, arm it is divided by)
    "idle": ("idle", "plain"),
    "all_layers": ("one", "idle"),
    "distinct_16": ("distinct_16", "one"),
    "distinct_64": ("distinct_64", "one_64"),
    "stacked_4": ("stacked_4", "one"),
    "hf_hooks": ("distinct_16", "hooks_distinct"),
    "hf_hooks_batched": ("one", "hooks"),
}
METRICS = (*RATIOS, "ttft_cached")
ALONE = 4  # requests that run one after another through hooks: enough for a throughput
PROMPT, ANSWER = 48, 32  # tokens
LONG = 1600  # tokens of the prompt whose first token is timed
OPTIONS: dict[str, Any] = {"max_model_len": 2048, "max_num_batched_tokens": 2048}


def vector(print_: Fingerprint, layers: int, seed: int) -> SteeringVector:
    """A random direction at every layer."""
    rng = np.random.default_rng(seed)
    raw = rng.standard_normal((layers, print_.width)).astype(np.float32)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    return SteeringVector(dict(enumerate(unit)), dict.fromkeys(range(layers), 1.0), print_, name=f"random-{seed}")


def prompts(count: int, length: int, seed: int, vocabulary: int) -> list[list[int]]:
    """Random token lists."""
    return np.random.default_rng(seed).integers(5, vocabulary, (count, length)).tolist()


def run(rounds: int = 5, small: bool = False, only: Sequence[str] = METRICS) -> BenchReport:
    """Run the benchmark.

    Args:
        rounds: times each arm is run; medians are taken over them.
        small: a tiny model, not compiled, to see that the benchmark runs.
        only: the metrics that are wanted; what they do not need is not started.

    Raises:
        SteerError: an unknown metric.
    """
    for metric in only:
        if metric not in METRICS:
            raise SteerError(f'unknown metric "{metric}": choose from {", ".join(METRICS)}')
    with tempfile.TemporaryDirectory() as folder, ExitStack() as engines:
        model = random_qwen(Path(folder) / "model", TINY if small else QWEN_0_8B)
        needed = {arm for metric in only for arm in RATIOS.get(metric, ())}
        plain = engines.enter_context(PlainVllm(model, enforce_eager=small, **OPTIONS)) if "plain" in needed else None
        engine = engines.enter_context(Engine(model, eager=small, **OPTIONS))
        return _measure(model, plain, engine, rounds, only)


def _measure(model: Path, plain: PlainVllm | None, engine: Engine, rounds: int, only: Sequence[str]) -> BenchReport:
    vocabulary = engine.tokenizer.vocab_size
    own = [vector(engine.fingerprint, engine.layers, seed) for seed in range(4)]
    one = [Intervention(own[0], 0.5)]
    settings: dict[str, Any] = {"max_tokens": ANSWER, "temperature": 0.0, "ignore_eos": True}
    fresh = iter(range(1, 10**9))

    def timed(generate: Callable[[list[list[int]]], Any], count: int) -> Callable[[], float]:
        """Tokens per second of an arm."""

        def arm() -> float:
            ids = prompts(count, PROMPT, next(fresh), vocabulary)
            started = time.perf_counter()
            generate(ids)
            return count * ANSWER / (time.perf_counter() - started)

        return arm

    def served(count: int, each: Any) -> Callable[[], float]:
        return timed(lambda ids: engine.generate(ids, each, **settings), count)

    def distinct(count: int) -> list[list[Intervention]]:
        scopes = ("all", "prompt", "generated", (-4, None))
        return [
            [Intervention(own[i % 4], 0.1 + i / count, tokens=scopes[i // 4 % 4], preserve_norm=i % 8 == 7)]
            for i in range(count)
        ]

    needed = {arm for metric in only for arm in RATIOS.get(metric, ())}
    hf = _hugging_face(model) if needed & {"hooks", "hooks_distinct"} else None
    arms = {
        "plain": timed(lambda ids: plain and plain.generate(ids, **settings), 16),
        "idle": served(16, []),
        "one": served(16, one),
        "distinct_16": served(16, distinct(16)),
        "stacked_4": served(16, [Intervention(v, 0.3) for v in own]),
        "one_64": served(64, one),
        "distinct_64": served(64, distinct(64)),
        "hooks": _hooks(hf, [one], 16, vocabulary),
        "hooks_distinct": _hooks(hf, distinct(16)[:ALONE], 1, vocabulary),
    }
    arms = {name: arm for name, arm in arms.items() if name in needed}
    for arm in arms.values():
        arm()  # the first run of each warms it up
    found: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            found[name].append(arms[name]())

    ratios = {
        metric: [a / b for a, b in zip(found[over], found[under], strict=True)]
        for metric, (over, under) in RATIOS.items()
        if metric in only
    }
    figures = {f"tokens per second: {name}": float(np.median(values)) for name, values in found.items()}
    if "ttft_cached" in only:
        first, taken = _first_token(engine, one, rounds, vocabulary)
        ratios["ttft_cached"] = [a / b for a, b in zip(first["cold"], first["cached"], strict=True)]
        figures["tokens from the cache of a prompt seen before"] = float(np.median(taken["cached"]))
        figures |= {f"seconds to first token of {LONG}: {name}": float(np.median(v)) for name, v in first.items()}
    return BenchReport("steering", ratios, {m: bar for m, bar in BARS.items() if m in only}, figures)


def _hugging_face(model: Path) -> Any:
    """The model in Hugging Face, in the dtype that is faster on this machine."""
    import torch

    from steer.engine.cpu import lacks_bfloat16
    from steer.model import load

    slow = not torch.cuda.is_available() and lacks_bfloat16()
    return load(model, dtype=torch.float32 if slow else torch.bfloat16)[0]


def _hooks(hf: Any, each: Sequence[list[Intervention]], batch: int, vocabulary: int) -> Callable[[], float]:
    """Tokens per second through forward hooks: a batch for each of the settings, one after another."""
    import torch

    from steer.reference import steered

    seeds = iter(range(batch * 10**6, 10**9))

    def arm() -> float:
        started, made = time.perf_counter(), 0
        for interventions in each:
            ids = torch.tensor(prompts(batch, PROMPT, next(seeds), vocabulary), device=hf.device)
            with torch.no_grad(), steered(hf, interventions, prompt_lengths=[PROMPT] * batch):
                out = hf.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=ANSWER,
                    min_new_tokens=ANSWER,
                    do_sample=False,
                )
            made += (out.shape[1] - ids.shape[1]) * batch
        return made / (time.perf_counter() - started)

    return arm


def _first_token(
    engine: Engine, interventions: list[Intervention], rounds: int, vocabulary: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(seconds to the first token of a long steered prompt, tokens taken from the cache): never seen, and seen before."""
    found: dict[str, list[float]] = {"cold": [], "cached": []}
    taken: dict[str, list[float]] = {"cold": [], "cached": []}
    for r in range(rounds):
        prompt = prompts(1, LONG, 10**9 + r, vocabulary)
        for name in found:
            started = time.perf_counter()
            answer = engine.generate(prompt, interventions, max_tokens=1, temperature=0.0)[0]
            found[name].append(time.perf_counter() - started)
            taken[name].append(float(answer.receipt.tokens_cached))
    return found, taken
