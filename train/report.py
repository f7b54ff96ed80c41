"""report.html: the demo's numbers as pictures, in one file without outside references."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steer.plots import panel, scores, svg

if TYPE_CHECKING:
    from train.demo import DemoResult

ARMS = ("base", "steered", "distilled")
LABELS = {"base": "base", "steered": "steered", "distilled": "distilled, no vector"}
COLOURS = {"base": "#8a94a6", "steered": "#e07b39", "distilled": "#2a7f62"}

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5b6776; --line: #d9dee5; --paper: #fff; --card: #f6f7f9 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #3a4452; --paper: #14181d; --card: #1d2329 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1060px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem } p, figcaption { color: var(--soft) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .6rem }
figure svg { width: 100%; height: auto } figcaption { font-size: .85rem; color: #5b6776 }
.yes { border-left: 3px solid #2a7f62 } .no { border-left: 3px solid #c9ced6 }
"""


def plot_rates(result: DemoResult) -> str:
    """Behaviour rate and fluency of the three arms with 95 % intervals."""
    figure, axes = panel(f"Held-out prompts: “{result.poles[0]}”")
    for y, arm in enumerate(reversed(ARMS)):
        for offset, values, marker, alpha in ((0.12, result.rates, "o", 1.0), (-0.16, result.fluent, "|", 0.55)):
            r = values[arm]
            axes.errorbar(
                r.mean, y + offset, xerr=[[r.mean - r.low], [r.high - r.mean]], fmt=marker, color=COLOURS[arm],
                alpha=alpha, capsize=3, markersize=8,
            )  # fmt: skip
        axes.annotate(f"{result.rates[arm].mean:.0%}", (result.rates[arm].mean, y + 0.2), ha="center", fontsize=9)
    axes.set_yticks(range(3), [LABELS[a] for a in reversed(ARMS)])
    axes.set_xlim(-0.02, 1.05)
    axes.set_ylim(-0.5, 2.6)
    axes.set_xlabel("share of answers (● behaviour, | fluent)", fontsize=8)
    axes.grid(axis="x", alpha=0.25)
    return svg(figure)


def plot_cost(result: DemoResult) -> str:
    """Neutral KL of the steered and the distilled arm, log scale."""
    figure, axes = panel("Cost on neutral text: KL to base")
    arms = ("steered", "distilled")
    values = [max(result.neutral_kl[a], 1e-6) for a in arms]
    axes.barh(range(2), values, color=[COLOURS[a] for a in arms], height=0.5)
    for y, value in enumerate(values):
        axes.annotate(f" {value:.4f}", (value, y), va="center", fontsize=9)
    axes.set_yticks(range(2), [LABELS[a] for a in arms])
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 3, max(values) * 6)
    axes.set_xlabel("nats per token, log scale", fontsize=8)
    return svg(figure)


def plot_search(result: DemoResult) -> str:
    """Layer × strength on the choose prompts, the operating point marked."""
    layers = sorted({c.layer for c in result.cells})
    strengths = sorted({c.strength for c in result.cells})
    grid = np.full((len(layers), len(strengths)), np.nan)
    for c in result.cells:
        grid[layers.index(c.layer), strengths.index(c.strength)] = min(c.rate, c.fluent)
    figure, axes = panel("Layer × strength on the choose prompts")
    axes.imshow(grid, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        axes.text(j, i, f"{value:.0%}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "black")
    x, y = strengths.index(result.strength), layers.index(result.layer)
    axes.add_patch(_square(x, y))
    axes.set_xticks(range(len(strengths)), [f"{s:g}" for s in strengths])
    axes.set_yticks(range(len(layers)), [f"{n} ({result.layer_kinds[n]})" for n in layers])
    axes.set_xlabel("strength in separations; number: lesser of rate and fluent", fontsize=8)
    return svg(figure)


def _square(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor="#e07b39", lw=2.5)


def plot_loss(reports: list[Any]) -> str:
    """Distillation losses by step; takes StepReports or their dicts."""
    rows = [r if isinstance(r, dict) else vars(r) for r in reports]
    figure, axes = panel("Distillation: KL by step")
    steps = [r["step"] for r in rows]
    axes.plot(steps, [r["decision_kl"] for r in rows], color="#e07b39", label="decisions, to the steered teacher")
    axes.plot(steps, [r["general_kl"] for r in rows], color="#2a7f62", label="general text, to the base")
    if rows:
        axes.set_yscale("log")
        axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("nats per token", fontsize=8)
    axes.grid(alpha=0.2)
    return svg(figure)


def html_report(result: DemoResult) -> str:
    """The page."""
    figures = [
        (plot_rates(result), "The same prompts and seeds in all three arms; 95 % Wilson intervals."),
        (plot_cost(result), "What each arm changes where nothing should change."),
        (
            svg(scores(result.vector, result.layer_kinds)),
            "How well the direction tells unseen pairs apart; bootstrap intervals over pairs.",
        ),
        (plot_search(result), "The orange cell is the gentlest of those within two points of the best."),
        (plot_loss(result.losses), "Frozen-context training with APOLLO, a quarter of each batch general text."),
    ]
    drawn = "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in figures)
    rows = "".join(
        f"<tr><td>{LABELS[arm]}</td><td>{result.rates[arm]}</td><td>{result.fluent[arm]}</td>"
        f"<td>{'0' if arm == 'base' else format(result.neutral_kl[arm], '.4f')}</td></tr>"
        for arm in ARMS
    )
    answers = "".join(
        f"<tr><td>{html.escape(s['prompt'])}</td>" + "".join(f"<td>{html.escape(s[a])}</td>" for a in ARMS) + "</tr>"
        for s in result.samples
    )
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
    version = result.weight_version
    title = f"Steer demo: {html.escape(result.behaviour)}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>“{html.escape(result.poles[0])}” against “{html.escape(result.poles[1])}”. Direction: mean difference at layer {result.layer}
({result.layer_kinds[result.layer]}), read at {html.escape(result.vector.read)}, strength {result.strength:g} separations at {html.escape(result.tokens)} tokens. Weight version
{version["before"]} → {version["after"]}; the vector is {"still active" if result.vector_active else "removed"}. Seed {result.seed}.</p>
<table><tr><th>arm</th><th>behaviour, n = {result.rates["base"].n}</th><th>fluent</th><th>neutral KL, nats/token</th></tr>{rows}</table>
<h2>Pictures</h2><div class="figures">{drawn}</div>
<h2>Answers side by side</h2>
<table><tr><th>prompt</th>{"".join(f"<th>{LABELS[a]}</th>" for a in ARMS)}</tr>{answers}</table>
<p>{seconds}</p></body></html>
"""


def write_html(result: DemoResult, folder: Path) -> Path:
    """Write report.html."""
    path = folder / "report.html"
    path.write_text(html_report(result), encoding="utf-8")
    return path
