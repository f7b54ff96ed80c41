"""The main job on the pocket model, end to end: pairs → direction → vLLM A/B → distilled weights → vector removed.

Every number comes from prompts that neither the extraction, nor the choice of layer and strength, nor the training has seen.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steer import pocket
from steer.engine import Completion, Engine
from steer.errors import SteerError
from steer.extraction import extract
from steer.intervention import Intervention
from steer.model import load
from steer.pocket import HeldOut
from steer.pocket.judge import fluent, judge
from steer.vector import SteeringVector
from steer.verify import Rate, neutral_kl, rate
from train.data import text_ids
from train.distill import DistillConfig, StepReport
from train.promote import MAX_ANSWER_TOKENS, promote

HELD_OUT = 240
SAMPLING: dict[str, Any] = {"max_tokens": MAX_ANSWER_TOKENS, "temperature": pocket.TEMPERATURE}
STRENGTHS = (0.4, 0.5, 0.6, 0.75, 1.0)
CHOOSE = 48
STAGES = ("engine", "extract", "choose", "compare", "promote", "prove")

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Cell:
    """One point of the search for layer and strength, on the choose prompts."""

    layer: int
    strength: float
    rate: float
    fluent: float


@dataclass
class DemoResult:
    """Everything the report shows."""

    behaviour: str
    poles: tuple[str, str]
    seed: int
    vector: SteeringVector
    layer: int
    strength: float
    tokens: str
    cells: list[Cell]
    rates: dict[str, Rate]
    fluent: dict[str, Rate]
    neutral_kl: dict[str, float]
    vector_active: bool
    weight_version: dict[str, int]
    losses: list[StepReport]
    samples: list[dict[str, str]]
    layer_kinds: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "behaviour": self.behaviour,
            "seed": self.seed,
            "rates": {arm: asdict(r) for arm, r in self.rates.items()},
            "fluent": {arm: asdict(r) for arm, r in self.fluent.items()},
            "neutral_kl": self.neutral_kl,
            "vector_active_after_promotion": self.vector_active,
            "weight_version": self.weight_version,
            "seconds": self.seconds,
            "operating_point": {
                "read": self.vector.read,
                "layer": self.layer,
                "kind": self.layer_kinds[self.layer],
                "strength": self.strength,
                "tokens": self.tokens,
                "held_out_score": asdict(self.vector.scores[self.layer]),
            },
            "samples": self.samples,
        }


def operating_point(cells: Sequence[Cell], norms: dict[int, float]) -> Cell:
    """The gentlest of the cells that are about as good as the best.

    "Good" is the lesser of rate and fluent share; "gentle" the shift in units of the layer's residual norm (`norms` is the
    shift at strength 1). Cells within two points of the best count as equal.
    """
    best = max(min(c.rate, c.fluent) for c in cells)
    equal = [c for c in cells if min(c.rate, c.fluent) >= best - 0.02]
    return min(equal, key=lambda c: c.strength * norms[c.layer])


def run(
    behaviour: str,
    folder: Path,
    seed: int = 0,
    config: DistillConfig | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> tuple[DemoResult, Engine]:
    """Run the whole path; returns the result and the engine, still serving the promoted weights.

    Args:
        behaviour: name in `pocket.BEHAVIOURS`.
        folder: where the vector, the training data and the new weights go.
        seed: of splits, sampling and training.
        config: distillation settings.
        progress: called with (stage, done, of, note).
        engine: one that serves the pocket model already; None: a new one.
    """
    recipe = pocket.recipe(behaviour)
    tell = progress or (lambda stage, done, of, note: None)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        tell(name, 0, 1, "")
        started = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - started, 2)
        tell(name, 1, 1, "")

    rng = random.Random(seed)
    choose = rng.sample(pocket.prompts("choose"), CHOOSE)
    held_out = rng.sample(pocket.prompts("held_out"), HELD_OUT)
    with stage("engine"):
        engine = engine or Engine(
            pocket.MODEL, eager=True
        )  # so small a model is served before a compiler has warmed up
    try:
        with stage("extract"):
            model, tokenizer = load(pocket.MODEL)
            fit, _, score = pocket.contrast_set(behaviour).split(seed, (0.7, 0.0, 0.3))
            vector = extract(
                model, fit, read=recipe.read, held_out=score, tokenizer=tokenizer, name=behaviour, poles=recipe.poles,
                source=pocket.MODEL,
                progress=lambda done, of: tell("extract", done, of, f"{len(fit)} pairs, read at {recipe.read}"),
            )  # fmt: skip
        with stage("choose"):
            cells = search(engine, vector, recipe, choose, seed, tell)
            shift = {n: vector.separation[n] / vector.residual_norm[n] for n in vector.layers}
            point = operating_point(cells, shift)
            vector = vector.use(point.layer, point.strength, recipe.tokens)
            folder.mkdir(parents=True, exist_ok=True)
            vector.save(folder / f"{behaviour}.safetensors")
        interventions = [Intervention(vector, point.strength, tokens=recipe.tokens)]
        prompts = [h.messages for h in held_out]
        with stage("compare"):
            base, with_vector = engine.compare(prompts, interventions, seed=seed * 9973 + 1, **SAMPLING)
        with stage("promote"):
            shutil.rmtree(folder / "promotion", ignore_errors=True)
            promotion = promote(
                engine,
                interventions,
                [h.messages for h in pocket.prompts("distill")],
                pocket.neutral("train"),
                folder / "promotion",
                config or DistillConfig(seed=seed),
                temperature=pocket.TEMPERATURE,
                progress=lambda what, done, of, report: tell(
                    "promote", done, of, f"loss {report.loss:.3f}" if report else what
                ),
            )
        with stage("prove"):
            without = engine.generate(prompts, seed=seed * 9973 + 1, **SAMPLING)
            texts = [text_ids(tokenizer, t) for t in pocket.neutral("held_out")]
            after, _ = load(promotion.weights)
            cost = {
                "steered": neutral_kl(model, model, texts, interventions),
                "distilled": neutral_kl(model, after, texts),
            }
    except BaseException:
        engine.close()
        raise
    arms = {"base": base, "steered": with_vector, "distilled": without}
    texts_of = {arm: [c.text for c in answers] for arm, answers in arms.items()}
    result = DemoResult(
        behaviour=behaviour,
        poles=recipe.poles,
        seed=seed,
        vector=vector,
        layer=point.layer,
        strength=point.strength,
        tokens=recipe.tokens,
        cells=cells,
        rates={arm: behaviour_rate(behaviour, held_out, answers) for arm, answers in arms.items()},
        fluent={arm: rate(fluent(t) for t in answers) for arm, answers in texts_of.items()},
        neutral_kl=cost,
        vector_active=any(c.receipt.interventions or c.receipt.tokens_steered for c in without),
        weight_version={"before": promotion.version_before, "after": without[0].receipt.weight_version},
        losses=promotion.reports,
        samples=_samples(held_out, texts_of),
        layer_kinds=_kinds(model),
        seconds=seconds,
        answers=texts_of,
    )
    return result, engine


def behaviour_rate(behaviour: str, prompts: Sequence[HeldOut], answers: Sequence[Completion]) -> Rate:
    """Share of answers that show the positive pole, by the exact judge."""
    return rate(judge(behaviour, h.request, a.text) for h, a in zip(prompts, answers, strict=True))


def search(
    engine: Engine,
    vector: SteeringVector,
    recipe: pocket.Recipe,
    prompts: Sequence[HeldOut],
    seed: int,
    tell: Progress,
) -> list[Cell]:
    """Rate and fluency on the choose prompts for the layers next to the recipe's and all strengths, one batch a layer."""
    cells: list[Cell] = []
    layers = [n for n in range(recipe.layer - 1, recipe.layer + 2) if n in vector.directions and n < max(vector.layers)]
    for done, layer in enumerate(layers):
        tell("choose", done, len(layers), f"layer {layer}")
        each = [[Intervention(vector, s, layers=(layer,), tokens=recipe.tokens)] for s in STRENGTHS for _ in prompts]
        messages = [h.messages for h in prompts] * len(STRENGTHS)
        answers = engine.generate(messages, each, seed=seed * 31 + 5, **SAMPLING)
        for k, strength in enumerate(STRENGTHS):
            part = answers[k * len(prompts) : (k + 1) * len(prompts)]
            shown = behaviour_rate(recipe.behaviour, prompts, part).mean
            cells.append(Cell(layer, strength, shown, rate(fluent(a.text) for a in part).mean))
    if not cells:
        raise SteerError(f"no layer to steer at next to layer {recipe.layer}")
    return cells


def _samples(prompts: Sequence[HeldOut], texts: dict[str, list[str]], count: int = 6) -> list[dict[str, str]]:
    """The first single-turn prompts with the three answers side by side."""
    rows = [i for i, h in enumerate(prompts) if len(h.messages) == 1][:count]
    return [{"prompt": prompts[i].messages[-1]["content"]} | {arm: t[i] for arm, t in texts.items()} for i in rows]


def _kinds(model: Any) -> list[str]:
    from steer.model import layer_kinds

    return layer_kinds(model.config)


def write_json(result: DemoResult, folder: Path) -> Path:
    """Write report.json."""
    path = folder / "report.json"
    path.write_text(json.dumps(result.record(), indent=2) + "\n", encoding="utf-8")
    return path
