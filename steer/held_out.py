"""How well a direction tells the sides of unseen pairs apart: AUROC of the projections, with a 95 % interval over pairs.

Only unseen pairs count: on the pairs it was fitted on, the mean difference of pure noise scores 1.000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from steer.errors import NoContrastError
from steer.methods import Method, mean_difference
from steer.vector import Score

FOLDS = 5
BOOTSTRAP = 1000
BLOCK = 64  # bootstrap draws weighed at once
CHUNK = 256  # pairs held in memory at once
ONLY_MEANS = frozenset({mean_difference})  # methods that are the same function of the two means as of all activations


@dataclass(frozen=True)
class Sides:
    """The activations of both sides of `count` pairs at one layer, wherever they are kept.

    `positive(first, last)` and `negative(first, last)` give rows `[last − first, d_model]` of the same pairs.
    """

    count: int
    positive: Callable[[int, int], np.ndarray]
    negative: Callable[[int, int], np.ndarray]

    @staticmethod
    def of(positive: np.ndarray, negative: np.ndarray) -> Sides:
        """Sides that are in memory, `[n, d_model]` each."""
        return Sides(len(positive), lambda a, b: positive[a:b], lambda a, b: negative[a:b])

    def part(self, first: int, last: int) -> Sides:
        """The pairs [first, last)."""
        return Sides(
            last - first,
            lambda a, b: self.positive(first + a, first + b),
            lambda a, b: self.negative(first + a, first + b),
        )


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve of scores `[n]` and `[m]`: P(positive > negative) + ½ P(equal)."""
    return float(_weighted_auroc(positive, negative, np.ones((1, len(positive))), np.ones((1, len(negative))))[0])


def _weighted_auroc(positive: np.ndarray, negative: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """AUROC `[draws]` where score i counts `up[:, i]` or `down[:, i]` times, from one sorting of all scores."""
    values = np.concatenate([positive, negative])
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(values[order]) > 0]))  # of the groups of equal scores
    n = len(positive)
    weights = np.concatenate([up, down], axis=1)[:, order]
    is_up = order < n
    ups = np.add.reduceat(weights * is_up, starts, axis=1)
    downs = np.add.reduceat(weights * ~is_up, starts, axis=1)
    below = downs.cumsum(1) - downs / 2
    return (ups * below).sum(1) / (up.sum(1) * down.sum(1))


def held_out_score(positive: np.ndarray, negative: np.ndarray, seed: int = 0) -> Score:
    """AUROC of the projections of unseen pairs, with a 95 % bootstrap interval over pairs.

    Args:
        positive: projections `[n]`; negative: projections of the same pairs `[n]`.
    """
    rng, n, draws = np.random.default_rng(seed), len(positive), []
    for start in range(0, BOOTSTRAP, BLOCK):
        times = rng.multinomial(n, np.full(n, 1 / n), min(BLOCK, BOOTSTRAP - start)).astype(np.float64)
        draws.append(_weighted_auroc(positive, negative, times, times))
    low, high = np.quantile(np.concatenate(draws), [0.025, 0.975])
    return Score(auroc(positive, negative), float(low), float(high), n)


def fit(sides: Sides, method: Method, folds: np.ndarray | None = None) -> list[np.ndarray | None]:
    """The direction of all pairs, or one for each fold, fitted on the pairs of the others.

    Memory is one chunk of pairs for methods of the means, and the layer's activations for the others.

    Args:
        folds: fold of each pair `[count]`.

    Returns:
        unit vectors `[d_model]`, float32; None where the pairs show no contrast.
    """
    count = int(folds.max()) + 1 if folds is not None else 1
    found: list[np.ndarray | None] = []
    if method in ONLY_MEANS:
        sums, sizes = _sums(sides, folds, count)
    else:
        positive, negative = sides.positive(0, sides.count), sides.negative(0, sides.count)
    for fold in range(count):
        try:
            if method in ONLY_MEANS:
                kept = [f for f in range(count) if f != fold or folds is None]
                means = sums[:, kept].sum(1) / sizes[kept].sum()
                direction = method(means[:1], means[1:])
            elif folds is None:
                direction = method(positive, negative)
            else:
                direction = method(positive[folds != fold], negative[folds != fold])
        except NoContrastError:
            found.append(None)
            continue
        raw = np.asarray(direction, dtype=np.float32)
        found.append(raw / np.linalg.norm(raw))
    return found


def _sums(sides: Sides, folds: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(sums `[2, folds, d_model]` of positives and negatives, pairs in each fold)."""
    sums: np.ndarray | None = None
    of = np.zeros(sides.count, dtype=int) if folds is None else folds
    for first in range(0, sides.count, CHUNK):
        last = min(first + CHUNK, sides.count)
        rows = [sides.positive(first, last), sides.negative(first, last)]
        if sums is None:
            sums = np.zeros((2, count, rows[0].shape[1]))
        for fold in range(count):
            here = of[first:last] == fold
            for side in (0, 1):
                sums[side, fold] += rows[side][here].sum(0, dtype=np.float64)
    assert sums is not None
    return sums, np.bincount(of, minlength=count)


def project(sides: Sides, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projections of the positives and of the negatives on directions `[k, d_model]`: `[count, k]` each."""
    up, down = np.empty((2, sides.count, len(directions)))
    for first in range(0, sides.count, CHUNK):
        last = min(first + CHUNK, sides.count)
        up[first:last] = sides.positive(first, last) @ directions.T
        down[first:last] = sides.negative(first, last) @ directions.T
    return up, down


def cross_validated(sides: Sides, families: Sequence[str], method: Method) -> Score:
    """Held-out score without a held-out set: each pair is scored by a direction fitted on the other families' folds.

    Args:
        families: of each pair; a family is never in two folds.
    """
    fold_of = {name: i % FOLDS for i, name in enumerate(sorted(set(families)))}
    folds = np.array([fold_of[f] for f in families])
    fitted = fit(sides, method, folds)
    blank = np.zeros(sides.positive(0, 1).shape[1], dtype=np.float32)  # tells nothing, as chance would have it
    up, down = project(sides, np.stack([blank if d is None else d for d in fitted]))
    # projections on one fold's direction are compared with those on another's: zero is put midway between the sides it was fitted on
    for fold in range(len(fitted)):
        rest = folds != fold
        middle = (up[rest, fold].mean() + down[rest, fold].mean()) / 2 if rest.any() else 0.0
        up[:, fold] -= middle
        down[:, fold] -= middle
    each = np.arange(sides.count)
    return held_out_score(up[each, folds], down[each, folds])
