"""ContrastSet × model × method → SteeringVector, with a held-out score for every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steer.capture import Read, capture
from steer.errors import NoContrastError, PairsError
from steer.fingerprint import fingerprint
from steer.methods import Method, resolve
from steer.pairs import ContrastSet, render
from steer.vector import Score, SteeringVector

FOLDS = 5
BOOTSTRAP = 1000


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve of scores `[n]` and `[m]`: P(positive > negative) + ½ P(equal)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def held_out_score(positive: np.ndarray, negative: np.ndarray, seed: int = 0) -> Score:
    """AUROC of the projections of unseen pairs, with a 95 % bootstrap interval over pairs.

    Args:
        positive: projections `[n]`; negative: projections of the same pairs `[n]`.
    """
    rng = np.random.default_rng(seed)
    n = len(positive)
    draws = [auroc(positive[i], negative[i]) for i in rng.integers(0, n, (BOOTSTRAP, n))]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Score(auroc(positive, negative), float(low), float(high), n)


def cross_validated(positive: np.ndarray, negative: np.ndarray, families: Sequence[str], method: Method) -> Score:
    """Held-out score without a held-out set: each pair is scored by a direction fitted on the other families' folds.

    Args:
        positive: activations `[n, d_model]`; negative: of the same pairs.
    """
    names = sorted(set(families))
    fold_of = {name: i % FOLDS for i, name in enumerate(names)}
    folds = np.array([fold_of[f] for f in families])
    up, down = np.empty(len(families)), np.empty(len(families))
    for fold in sorted(set(folds.tolist())):
        test, fit = folds == fold, folds != fold
        try:
            direction = method(positive[fit], negative[fit])
        except NoContrastError:
            up[test] = down[test] = 0.0  # tells nothing: half of the pairs, as chance would have it
            continue
        centre = (positive[fit] @ direction).mean() / 2 + (negative[fit] @ direction).mean() / 2
        up[test], down[test] = positive[test] @ direction - centre, negative[test] @ direction - centre
    return held_out_score(up, down)


def extract(
    model: Any,
    pairs: ContrastSet,
    method: str | Method = "mean_difference",
    read: Read = "last_prompt",
    layers: Sequence[int] | None = None,
    held_out: ContrastSet | None = None,
    tokenizer: Any = None,
    name: str = "vector",
    poles: tuple[str, str] = ("positive", "negative"),
    source: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SteeringVector:
    """Read a behaviour's direction off a model.

    Args:
        model: path or hub id, a Hugging Face model (then `tokenizer` is needed unless its path is known), or an Engine,
            which reads its own activations while it serves.
        pairs: the pairs the direction is fitted on; at least four.
        method: name in `steer.methods.METHODS`, or a function (positive, negative) → direction.
        read: read position.
        layers: layer numbers; None: all.
        source: path or hub id `model` was loaded from, for a fingerprint that covers the tokenizer too.
        held_out: pairs the score is taken on; None: five-fold cross-validation over the families of `pairs`.

    Returns:
        A vector of all layers at which the sides differ, whose `selected` layer is the one with the best held-out score, the middlest of equals. A score says
        how well the direction *detects*; choose where to *steer* by generating.
    """
    from steer.model import load

    if len(pairs) < 4:
        raise PairsError(f"extraction needs at least 4 pairs, not {len(pairs)}")
    print_of = source or model
    if isinstance(model, str | Path):
        model, found = load(str(model))
        tokenizer = tokenizer or found
    served = not hasattr(model, "named_parameters")
    if tokenizer is None and served:
        tokenizer = model.tokenizer
    elif tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    method_name, function = resolve(method)
    everything = list(pairs) + list(held_out or [])
    items = [render(tokenizer, *p.sides()[0]) for p in everything] + [
        render(tokenizer, *p.sides()[1]) for p in everything
    ]
    captured = model.capture(items, layers, read) if served else capture(model, items, layers, read, progress=progress)
    depth = model.layers if served else model.config.get_text_config().num_hidden_layers

    n, m = len(pairs), len(everything)
    directions, separation, norms, scores = {}, {}, {}, {}
    for layer, activations in captured.items():
        positive, negative = activations[:m], activations[m:]
        try:
            direction = np.asarray(function(positive[:n], negative[:n]), dtype=np.float32)
        except NoContrastError:
            continue  # early layers may know nothing of the contrast yet: in bfloat16 both means are then the same
        direction = direction / np.linalg.norm(direction)
        directions[layer] = direction
        separation[layer] = float((positive[:n] @ direction).mean() - (negative[:n] @ direction).mean())
        norms[layer] = float(np.median(np.linalg.norm(activations[: m + n], axis=1)))
        if held_out:
            scores[layer] = held_out_score(positive[n:] @ direction, negative[n:] @ direction)
        else:
            scores[layer] = cross_validated(positive, negative, [p.family or p.id for p in pairs], function)
    if not directions:
        raise NoContrastError(
            "positive and negative activations have the same mean at every layer: the pairs show no contrast"
        )
    middle = 0.55 * depth
    best = max(scores, key=lambda k: (round(scores[k].mean, 3), -abs(k - middle)))
    return SteeringVector(
        directions=directions,
        separation=separation,
        residual_norm=norms,
        scores=scores,
        selected=(best,),
        method=method_name,
        read=str(read),
        name=name,
        poles=poles,
        fingerprint=fingerprint(print_of),
        pairs_hash=pairs.hash,
        split_hashes={"fit": pairs.hash} | ({"held_out": held_out.hash} if held_out else {}),
    )
