"""Pictures of directions: what reports, the command line and notebooks draw in one way."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from steer.vector import SteeringVector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GDN, ATTENTION, MARK = "#4361a8", "#a84376", "#e07b39"


def panel(title: str, size: tuple[float, float] = (5.6, 3.2)) -> tuple[Figure, Any]:
    """(figure, axes) in the house style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def svg(figure: Figure) -> str:
    """The figure as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def cosines(names: Sequence[str], matrix: Any, layer: int) -> Figure:
    """Cosine matrix `[n, n]` of the vectors' directions at a layer, every value written in its cell."""
    n = len(names)
    figure, axes = panel(f"cosines of the directions at layer {layer}", (2.4 + 0.7 * n, 1.6 + 0.6 * n))
    axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    for i in range(n):
        for j in range(n):
            colour = "white" if abs(matrix[i][j]) > 0.6 else "black"
            axes.text(j, i, f"{matrix[i][j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(n), names, rotation=30, ha="right")
    axes.set_yticks(range(n), names)
    return figure


def scores(vector: SteeringVector, kinds: Sequence[str]) -> Figure:
    """Held-out AUROC by layer with its 95 % interval.

    Args:
        kinds: of every layer of the model, as `steer.model.layer_kinds` gives them.
    """
    figure, axes = panel(f"“{vector.name}”, {vector.method} read at {vector.read}: held-out pairs")
    for layer in vector.layers:
        s, gdn = vector.scores[layer], kinds[layer] == "gdn"
        spread = [[max(s.mean - s.low, 0.0)], [max(s.high - s.mean, 0.0)]]
        style = {"fmt": "o" if gdn else "s", "color": GDN if gdn else ATTENTION}
        axes.errorbar(layer, s.mean, yerr=spread, capsize=3, **style)
    for layer in vector.selected:
        axes.axvline(layer, color=MARK, lw=1, ls=":")
    axes.axhline(0.5, color="#999", lw=0.8)
    step = -(-len(kinds) // 16)
    axes.set_xticks(range(0, len(kinds), step))
    axes.set_xlim(-0.6, len(kinds) - 0.4)
    legend = "● GDN, ■ attention; " if "gdn" in kinds else ""
    axes.set_xlabel(f"layer ({legend}dotted: selected)", fontsize=8)
    axes.set_ylabel("AUROC", fontsize=8)
    axes.set_ylim(min(0.3, min(s.low for s in vector.scores.values()) - 0.03), 1.03)
    return figure
