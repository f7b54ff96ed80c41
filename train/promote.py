"""Promotion: a vector's behaviour goes into the served weights, and the vector is removed.

    sample    the engine answers prompts with the vector on: the steered teacher's decisions
    train     distil them into a copy of the weights (in this process, or in one of its own)
    swap      the engine loads the new weights in place; its weight version rises
    prove     the same held-out prompts again, without the vector

A promotion's folder holds all that training needs, so that it can be resumed, or trained again to the same weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.errors import SteerError
from steer.intervention import Intervention
from steer.store.vectors import VectorStore
from train.data import Decision, load_decisions, load_texts, save_jsonl, text_ids
from train.distill import DistillConfig, StepReport, distill

if TYPE_CHECKING:
    from steer.engine import Completion, Engine
    from steer.engine.engine import Prompt

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Promotion:
    """What a promotion did."""

    weights: Path
    version_before: int
    version_after: int
    reports: list[StepReport]


def sample_decisions(
    engine: Engine,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    seed: int = 0,
    max_tokens: int = MAX_ANSWER_TOKENS,
    temperature: float = 1.0,
    keep: Callable[[int, Completion], bool] | None = None,
) -> list[Decision]:
    """The steered engine's answers as decisions; cut-off answers, and those `keep(index, answer)` rejects, are left out."""
    answers = engine.generate(prompts, interventions, seed=seed, max_tokens=max_tokens, temperature=temperature)
    return [
        Decision(a.prompt_token_ids, a.token_ids)
        for i, a in enumerate(answers)
        if a.finish_reason == "stop" and (keep is None or keep(i, a))
    ]


def prepare(
    folder: Path,
    model: str | Path,
    decisions: Sequence[Decision],
    interventions: Sequence[Intervention],
    general: Sequence[Sequence[int]],
    config: DistillConfig,
) -> None:
    """Write all that training needs into a folder; `train_folder` takes it from there."""
    if not decisions:
        raise SteerError("no steered answer was finished, so there is nothing to distil")
    folder.mkdir(parents=True, exist_ok=True)
    save_jsonl(folder / "decisions.jsonl", decisions)
    save_jsonl(folder / "general.jsonl", [list(t) for t in general])
    (folder / "vectors").mkdir(exist_ok=True)
    for i in interventions:
        for vector in [i.vector, *([i.when.vector] if i.when else [])]:
            vector.save(folder / "vectors" / f"{vector.hash}.safetensors")
    terms = [i.record() for i in interventions]
    task = {"model": str(Path(model).resolve() if Path(model).exists() else model), "interventions": terms}
    (folder / "task.json").write_text(json.dumps(task | {"config": asdict(config)}, indent=1), encoding="utf-8")


def train_folder(
    folder: Path,
    progress: Callable[[StepReport], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[StepReport]:
    """Distil what `prepare` wrote; the new weights go to `folder/weights`, a complete model folder.

    Resumes from `folder/checkpoint.safetensors` if there is one. Returns without weights if it was cancelled.
    """
    import torch

    from steer.model import load

    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    config = DistillConfig(**task["config"])
    model, tokenizer = load(task["model"], dtype=torch.float32)
    vectors = VectorStore(folder / "vectors")
    interventions = [Intervention.from_record(t, vectors.resolve) for t in task["interventions"]]
    decisions, general = load_decisions(folder / "decisions.jsonl"), load_texts(folder / "general.jsonl")
    checkpoint = folder / "checkpoint.safetensors"
    reports = distill(model, decisions, interventions, general, config, checkpoint, progress, cancelled)
    if cancelled and cancelled():
        return reports
    staging, final = folder / "weights.partial", folder / "weights"
    shutil.rmtree(staging, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    return reports


def promote(
    engine: Engine,
    interventions: Sequence[Intervention],
    prompts: Sequence[Prompt],
    general: Sequence[Any],
    folder: Path,
    config: DistillConfig | None = None,
    keep: Callable[[int, Completion], bool] | None = None,
    temperature: float = 1.0,
    progress: Callable[[str, int, int, StepReport | None], None] | None = None,
) -> Promotion:
    """Sample, train in this process, and swap. Afterwards the engine's plain answers show the behaviour.

    Args:
        engine: the served model.
        interventions: what is promoted.
        prompts: prompts the steered teacher answers.
        general: conversations or texts that must not change.
        folder: where everything is kept.
        keep: which answers to train on; None: all that are finished.
        temperature: the teacher's answers are sampled at.
        progress: called with (stage, done, of, step report).
    """
    config = config or DistillConfig()
    tell = progress or (lambda stage, done, of, report: None)
    tell("sample", 0, 1, None)
    decisions = sample_decisions(
        engine, prompts, interventions, config.seed * 100_003 + 17, keep=keep, temperature=temperature
    )
    texts = [text_ids(engine.tokenizer, t) for t in general]
    prepare(folder, engine.weights_path, decisions, interventions, texts, config)
    tell("sample", 1, 1, None)
    reports = train_folder(folder, lambda r: tell("train", r.step, r.steps, r))
    before = engine.weight_version
    after = engine.update_weights(folder / "weights")
    tell("swap", 1, 1, None)
    return Promotion(folder / "weights", before, after, reports)
