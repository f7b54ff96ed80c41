"""Measure the pocket model and ship its vectors: what README.md of this folder reports.

    python examples/pocket_model/measure.py             # about ten minutes on 2 cores

Writes `measured.json` and `steerability.png` here, and the vectors into `steer/pocket/vectors/`. The recipes
(`steer/pocket/data/recipes.json`) were chosen on the choose prompts; the rates of the recipes are of the held-out prompts.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from steer import pocket
from steer.engine import Engine
from steer.extraction import extract
from steer.intervention import Intervention
from steer.model import layer_kinds, load
from steer.pocket import language
from steer.pocket.judge import fluent, judge, repeats
from steer.verify import rate
from train.data import text_ids

HERE = Path(__file__).parent
STRENGTHS = (0.35, 0.5, 0.8)
PROMPTS = 20
READS = ("last_prompt", "response_mean", "response_last")


def perplexities(model: Any, tokenizer: Any) -> dict[str, float]:
    """Perplexity per word of fresh texts of each kind; in conversations, of the answers."""
    rng = random.Random(99)
    kinds = {
        "stories": [language.story(rng) for _ in range(100)],
        "facts and sums": [language.question(rng)[1] for _ in range(200)],
        "answers, held-out requests": [language.conversation(rng, held_out=True, turns=1) for _ in range(200)],
    }
    found = {}
    for kind, texts in kinds.items():
        total, count = 0.0, 0
        for text in texts:
            ids = text_ids(tokenizer, text)
            start = 1
            if not isinstance(text, str):
                answer = tokenizer(text[-1]["content"])["input_ids"]
                start = len(ids) - len(answer) - 1
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            total += float(cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum"))
            count += len(ids) - start
        found[kind] = math.exp(total / count)
    return found


def personas(engine: Engine) -> dict[str, dict[str, float]]:
    """Share of held-out answers that obey a persona prompt, and that show the positive pole without one."""
    held_out = pocket.prompts("held_out")[:240]
    plain = [a.text for a in engine.generate([h.messages for h in held_out], seed=1, temperature=pocket.TEMPERATURE)]
    found: dict[str, dict[str, float]] = {}
    for name, b in pocket.BEHAVIOURS.items():
        row: dict[str, float] = {"unprompted": share(name, held_out, plain)}
        for pole, phrases in ((True, b.positive), (False, b.negative)):
            messages = [[{"role": "system", "content": phrases[i % 3]}, *h.messages] for i, h in enumerate(held_out)]
            answers = [a.text for a in engine.generate(messages, seed=2, temperature=pocket.TEMPERATURE)]
            row["obeyed_" + ("positive" if pole else "negative")] = share(name, held_out, answers, pole)
        found[name] = row
    found["all"] = {
        "fluent_unprompted": sum(map(fluent, plain)) / len(plain),
        "repeats_unprompted": sum(map(repeats, plain)) / len(plain),
    }
    return found


def share(behaviour: str, prompts: list[pocket.HeldOut], answers: list[str], pole: bool = True) -> float:
    return sum(judge(behaviour, h.request, a) is pole for h, a in zip(prompts, answers, strict=True)) / len(answers)


def steerability(engine: Engine, model: Any, tokenizer: Any) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """behaviour → read position → per layer: the largest movement between −s and +s among the fluent settings.

    At the last prompt token's direction the prompt alone is steered as well as all tokens, and the better of the two is kept.
    """
    choose = pocket.prompts("choose")[:PROMPTS]
    messages = [h.messages for h in choose]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    work = [(b, r) for b in pocket.BEHAVIOURS for r in READS]
    for behaviour, read in tqdm(work, desc="steerability"):
        pairs = pocket.contrast_set(behaviour)
        if read != "last_prompt" and pairs[0].positive_response is None:
            continue
        vector = extract(
            model, pairs[:100], read=read, tokenizer=tokenizer, source=pocket.MODEL, name=behaviour,
            poles=pocket.BEHAVIOURS[behaviour].poles,
        )  # fmt: skip
        scopes = ("all", "prompt") if read == "last_prompt" else ("all",)
        settings = [(scope, s) for scope in scopes for s in STRENGTHS]
        rows = []
        for layer in vector.layers:
            each = [
                [Intervention(vector, sign * s, layers=(layer,), tokens=scope)]
                for scope, s in settings
                for sign in (1, -1)
                for _ in choose
            ]
            made = engine.generate(messages * (2 * len(settings)), each, seed=3, temperature=pocket.TEMPERATURE)
            answers = [a.text for a in made]
            best: dict[str, Any] = {
                "layer": layer,
                "moved": 0.0,
                "strength": 0.0,
                "tokens": "all",
                "up": 0.0,
                "down": 0.0,
            }
            for k, (scope, s) in enumerate(settings):
                up = answers[2 * k * PROMPTS : (2 * k + 1) * PROMPTS]
                down = answers[(2 * k + 1) * PROMPTS : (2 * k + 2) * PROMPTS]
                good = sum(map(fluent, up + down)) / (2 * PROMPTS)
                high, low = share(behaviour, choose, up), share(behaviour, choose, down)
                if good >= 0.95 and high - low > best["moved"]:
                    best |= {"moved": high - low, "strength": s, "tokens": scope, "up": high, "down": low}
            rows.append(best)
        found.setdefault(behaviour, {})[read] = rows
    return found


def held_out_table(engine: Engine, chosen: dict[str, dict[str, Any]], model: Any, tokenizer: Any) -> dict[str, Any]:
    """The recipes on the held-out prompts, both directions; the vectors are saved as they are shipped."""
    pocket.VECTORS.mkdir(exist_ok=True)
    held_out = pocket.prompts("held_out")[:240]
    table = {}
    for behaviour, r in chosen.items():
        fit, _, score = pocket.contrast_set(behaviour).split(0, (0.7, 0.0, 0.3))
        vector = extract(
            model, fit, read=r["read"], held_out=score, tokenizer=tokenizer, source=pocket.MODEL, name=behaviour,
            poles=pocket.BEHAVIOURS[behaviour].poles,
        ).use(r["layer"], r["strength"], r["tokens"])  # fmt: skip
        vector.save(pocket.VECTORS / f"{behaviour}.safetensors")
        row: dict[str, Any] = {}
        for sign, label in ((1, "up"), (-1, "down")):
            answers = engine.generate(
                [h.messages for h in held_out],
                [Intervention(vector, sign * r["strength"], tokens=r["tokens"])],
                seed=4,
                temperature=pocket.TEMPERATURE,
            )
            row[label] = vars(rate(judge(behaviour, h.request, a.text) for h, a in zip(held_out, answers, strict=True)))
            row[f"fluent_{label}"] = sum(fluent(a.text) for a in answers) / len(answers)
        table[behaviour] = r | row
    return table


def draw(found: dict[str, dict[str, list[dict[str, float]]]], kinds: list[str], path: Path) -> None:
    """Heat map of movement by layer × read position, one panel a behaviour."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(len(found), 1, sharex=True)
    for ax, (behaviour, reads) in zip(axes, found.items(), strict=True):
        grid = np.array([[row["moved"] for row in rows] for rows in reads.values()])
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            ax.text(
                j,
                i,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                color="white" if value > 0.6 else "black",
                fontsize=9,
            )
        ax.set_yticks(range(len(reads)), list(reads), fontsize=8)
        ax.set_title(f"{behaviour}: decided at the {pocket.BEHAVIOURS[behaviour].decided}", loc="left", fontsize=9)
    axes[-1].set_xticks(range(len(kinds)), [f"{i}\n{k}" for i, k in enumerate(kinds)])
    axes[-1].set_xlabel("layer steered, and read")
    figure.colorbar(image, ax=axes, label="points moved between −s and +s, fluent ≥ 95 %", shrink=0.6)
    figure.savefig(path, dpi=110)


def main() -> None:
    model, tokenizer = load(pocket.MODEL)
    kinds = layer_kinds(model.config)
    with Engine(pocket.MODEL, eager=True) as engine:
        measured: dict[str, Any] = {
            "temperature": pocket.TEMPERATURE,
            "perplexity": perplexities(model, tokenizer),
            "personas": personas(engine),
        }
        found = steerability(engine, model, tokenizer)
        chosen = json.loads((pocket.DATA / "recipes.json").read_text())
        measured |= {"steerability": found, "held_out": held_out_table(engine, chosen, model, tokenizer)}
    (HERE / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    draw(found, kinds, HERE / "steerability.png")
    for name, row in measured["personas"].items():
        print(name, {k: round(v, 3) for k, v in row.items()})
    for name, row in measured["held_out"].items():
        print(name, row["read"], row["layer"], kinds[row["layer"]], row["strength"], f"{row['down']['mean']:.2f} → {row['up']['mean']:.2f}",
              f"fluent {row['fluent_down']:.2f} {row['fluent_up']:.2f}")  # fmt: skip
    print({k: round(v, 3) for k, v in measured["perplexity"].items()})


if __name__ == "__main__":
    main()
