"""Extraction methods: planted directions, signs, closed forms, pure noise."""

from __future__ import annotations

import numpy as np
import pytest

from steer.errors import NoContrastError, SteerError
from steer.held_out import Sides, auroc, cross_validated, fit, held_out_score
from steer.methods import (
    METHODS,
    contrast_consistent,
    discriminant,
    logistic,
    mean_difference,
    paired_pca,
    resolve,
)


def planted(
    seed: int, pairs: int = 96, width: int = 256, nuisance: float = 3.0, spread: float = 1.5, noise: float = 0.1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positive, negative, direction): pairs share a nuisance, and the effect along the direction differs from pair to pair."""
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal(width)
    direction /= np.linalg.norm(direction)
    shared = nuisance * rng.standard_normal((pairs, width))
    effect = rng.normal(2, spread, (pairs, 1)) * direction
    positive = shared + effect + noise * rng.standard_normal((pairs, width))
    negative = shared + noise * rng.standard_normal((pairs, width))
    return positive.astype(np.float32), negative.astype(np.float32), direction


@pytest.mark.parametrize(
    ("method", "least"),
    [
        (mean_difference, 0.98),
        (paired_pca, 0.99),
        (logistic, 0.85),
        (discriminant, 0.85),
        (contrast_consistent, 0.80),
    ],
)
def test_a_planted_direction_is_found_with_its_sign_in_every_draw(method, least: float) -> None:
    for seed in range(12):
        positive, negative, direction = planted(seed)
        found = method(positive, negative)
        assert found.dtype == np.float32
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
        assert found @ direction > least, seed
        assert method(negative, positive) @ direction < -least, "the sides swapped, the direction is reversed"


def test_the_mean_difference_is_the_published_definition() -> None:
    positive, negative, _ = planted(3)
    by_hand = positive.astype(np.float64).mean(0) - negative.astype(np.float64).mean(0)
    np.testing.assert_allclose(
        mean_difference(positive, negative), by_hand / np.linalg.norm(by_hand), rtol=1e-5, atol=1e-7
    )


def test_paired_pca_is_the_uncentred_singular_vector_and_unlike_the_centred_one() -> None:
    positive, negative, direction = planted(4, nuisance=0.0, spread=0.0, noise=1.0)
    d = positive.astype(np.float64) - negative
    first = np.linalg.svd(d, full_matrices=False)[2][0]
    assert abs(paired_pca(positive, negative) @ first) == pytest.approx(1, abs=1e-6)
    centred = np.linalg.svd(d - d.mean(0), full_matrices=False)[2][0]
    assert abs(centred @ direction) < 0.2, "centring throws an equal effect away"


def test_the_discriminant_is_the_closed_form() -> None:
    from sklearn.covariance import ledoit_wolf

    for pairs, width in ((40, 64), (120, 16)):  # both ways of solving it
        positive, negative, _ = planted(5, pairs, width)
        p, n = positive.astype(np.float64), negative.astype(np.float64)
        covariance = ledoit_wolf(np.concatenate([p - p.mean(0), n - n.mean(0)]), assume_centered=True)[0]
        by_hand = np.linalg.solve(covariance, p.mean(0) - n.mean(0))
        by_hand /= np.linalg.norm(by_hand)
        assert discriminant(positive, negative) @ by_hand == pytest.approx(1, abs=1e-6)


def test_the_discriminant_turns_away_from_what_varies_within_a_side() -> None:
    rng = np.random.default_rng(6)
    direction, loud = np.eye(32)[:2]
    noise = rng.standard_normal((2, 200, 32)) + 20 * rng.standard_normal((2, 200, 1)) * loud
    positive, negative = noise[0] + 2 * direction + 2 * loud, noise[1]
    assert abs(discriminant(positive, negative) @ loud) < 0.1
    assert abs(mean_difference(positive, negative) @ loud) > 0.3


def test_the_logistic_probe_is_at_its_optimum() -> None:
    """The gradient of the conditional likelihood vanishes: w = C Σ σ(−⟨w, d⟩/s) d/s."""
    positive, negative, _ = planted(7, pairs=60, width=8, nuisance=1.0, noise=1.0)
    d = positive.astype(np.float64) - negative
    d /= np.sqrt((d**2).sum(1).mean())
    w = np.zeros(8)
    for _ in range(20000):
        w -= 0.02 * (w - (d.T @ (1 / (1 + np.exp(d @ w)))))
    assert logistic(positive, negative) @ (w / np.linalg.norm(w)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", METHODS.values())
def test_sides_that_are_equal_have_no_direction(method) -> None:
    with pytest.raises(NoContrastError):
        method(np.ones((6, 8), np.float32), np.ones((6, 8), np.float32))


@pytest.mark.parametrize("method", METHODS.values())
def test_pure_noise_never_looks_good(method) -> None:
    means = []
    for seed in range(6):
        positive, negative = np.random.default_rng(seed).standard_normal((2, 48, 256)).astype(np.float32)
        score = cross_validated(Sides.of(positive, negative), [str(i) for i in range(48)], method)
        assert score.low <= score.mean <= score.high
        means.append(score.mean)
    assert abs(np.mean(means) - 0.5) < 0.08


def test_noise_looks_perfect_to_those_who_fitted_it() -> None:
    positive, negative = np.random.default_rng(1).standard_normal((2, 64, 1024)).astype(np.float32)
    direction = mean_difference(positive, negative)
    assert auroc(positive @ direction, negative @ direction) > 0.99


def test_methods_of_the_means_need_no_more_than_the_means() -> None:
    """In chunks, and a fold at a time, the mean difference is what it is of all activations at once."""
    positive, negative, _ = planted(8, pairs=700, width=32)
    folds = np.arange(700) % 3
    sides = Sides.of(positive, negative)
    for fold, found in enumerate(fit(sides, mean_difference, folds)):
        rest = folds != fold
        assert found is not None
        np.testing.assert_allclose(found, mean_difference(positive[rest], negative[rest]), atol=1e-6)
    (whole,) = fit(sides, mean_difference)
    assert whole is not None
    np.testing.assert_allclose(whole, mean_difference(positive, negative), atol=1e-6)
    at_once = fit(sides, lambda p, n: mean_difference(p, n), folds)[1]
    assert at_once is not None
    np.testing.assert_allclose(at_once, mean_difference(positive[folds != 1], negative[folds != 1]), atol=1e-6)


def test_auroc_is_the_share_of_ordered_pairs() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 8, 30).astype(float), rng.integers(0, 8, 20).astype(float)
    brute = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert auroc(a, b) == pytest.approx(brute)
    assert held_out_score(a, a).mean == pytest.approx(0.5)


def test_the_interval_is_the_bootstrap_over_pairs() -> None:
    rng = np.random.default_rng(3)
    up, down = rng.normal(0.7, 1, 60), rng.normal(0, 1, 60)
    score = held_out_score(up, down)
    draws = [auroc(up[i], down[i]) for i in rng.integers(0, 60, (1000, 60))]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (score.low, score.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_unknown_methods_are_named_with_the_known_ones() -> None:
    with pytest.raises(SteerError, match=r'"magic": choose from mean_difference, .*learned'):
        resolve("magic")
