"""ContrastSet × model × methods × read positions → SteeringVectors, with a held-out score for every layer.

The model reads each text once, whatever is made of it. Its block outputs go to disk and come back a layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from steer.activations import Activations
from steer.capture import Read, captured, layer_numbers
from steer.errors import NoContrastError, PairsError, SteerError
from steer.fingerprint import Fingerprint, fingerprint
from steer.held_out import Sides, cross_validated, fit, held_out_score, project
from steer.methods import LEARNED, Method, resolve
from steer.pairs import ContrastSet, Rendered, render
from steer.vector import Score, SteeringVector

FEWEST = 4  # pairs
MIDDLE = 0.55  # of the depth, where equal layers are most often best (see the field notes in the README)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Reader:
    """A model to read block outputs of: a Hugging Face model, or an Engine, which reads its own while it serves."""

    model: Any
    tokenizer: Any
    print: Fingerprint
    depth: int
    served: bool

    def captured(
        self, items: Sequence[Rendered], layers: Sequence[int], reads: Sequence[Read], progress: Progress | None
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        if self.served:
            return self.model.captured(items, layers, reads, progress=progress)
        return captured(self.model, items, layers, reads, progress=progress)


def _reader(model: Any, tokenizer: Any, source: str | Path | None) -> _Reader:
    from steer.model import load

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
    depth = model.layers if served else model.config.get_text_config().num_hidden_layers
    return _Reader(model, tokenizer, fingerprint(print_of), depth, served)


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
    progress: Progress | None = None,
) -> SteeringVector:
    """Read a behaviour's direction off a model.

    Args:
        model: path or hub id, a Hugging Face model (then `tokenizer` is needed unless its path is known), or an Engine,
            which reads its own activations while it serves.
        pairs: the pairs the direction is fitted on; at least four.
        method: name in `steer.methods.METHODS`, "learned", or a function (positive, negative) → direction.
        read: read position.
        layers: layer numbers; None: all, but for "learned" the one at which the mean difference scores best.
        source: path or hub id `model` was loaded from, for a fingerprint that covers the tokenizer too.
        held_out: pairs the score is taken on; None: five-fold cross-validation over the families of `pairs`.

    Returns:
        A vector of all layers at which the sides differ, whose `selected` layer is the one with the best held-out score, the middlest of equals. A score says
        how well the direction *detects*; choose where to *steer* by generating (`steer.choose`).

    Raises:
        PairsError: too few pairs, or a pair without the position to read at.
        NoContrastError: both sides have the same mean at every layer.
    """
    found = extract_each(
        model, pairs, (method,), (read,), layers, held_out, tokenizer, name, poles, source, progress
    )  # fmt: skip
    return next(iter(found.values()))


def extract_each(
    model: Any,
    pairs: ContrastSet,
    methods: Sequence[str | Method] = ("mean_difference",),
    reads: Sequence[Read] = ("last_prompt",),
    layers: Sequence[int] | None = None,
    held_out: ContrastSet | None = None,
    tokenizer: Any = None,
    name: str = "vector",
    poles: tuple[str, str] = ("positive", "negative"),
    source: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[tuple[str, Read], SteeringVector]:
    """The directions of several methods and read positions from one pass over the texts; arguments as of `extract`.

    Returns:
        (method's name, read position) → vector.
    """
    if len(pairs) < FEWEST:
        raise PairsError(f"extraction needs at least {FEWEST} pairs, not {len(pairs)}")
    if not methods or not reads:
        raise SteerError("extraction needs at least one method and one read position")
    resolved = [resolve(m) for m in methods]
    reader = _reader(model, tokenizer, source)
    if any(label == LEARNED for label, _ in resolved):
        if reader.served:
            raise SteerError('the method "learned" needs gradients: give a Hugging Face model or its path, no engine')
        if not held_out:
            raise PairsError(
                'the method "learned" needs held_out pairs: cross-validation would train it five times over'
            )
    wanted = layer_numbers(layers, reader.depth)
    everything = list(pairs) + list(held_out or [])
    items = [render(reader.tokenizer, *p.sides()[side]) for side in (0, 1) for p in everything]
    n, m = len(pairs), len(everything)
    families = [p.family or p.id for p in pairs]
    norms = np.empty((len(reads), len(wanted), 2 * m), np.float32)
    found: dict[tuple[str, Read], SteeringVector] = {}
    with Activations(len(reads), wanted, 2 * m, reader.print.width) as stored:
        for texts, values in reader.captured(items, wanted, reads, progress):
            stored.write(texts, values)
            norms[:, :, texts] = np.linalg.norm(values, axis=-1)
        fitted = [*range(n), *range(m, m + n)]
        for r, read in enumerate(reads):
            residual = np.median(norms[r][:, fitted], axis=1)
            for label, function in resolved:
                directions, separation, scores = {}, {}, {}
                for layer in wanted:
                    both = Sides(m, *(_side(stored, r, layer, first) for first in (0, m)))
                    one = _one_layer(both, n, families, function)
                    if one is not None:
                        directions[layer], separation[layer], scores[layer] = one
                if not directions:
                    raise NoContrastError(
                        f"positive and negative activations have the same mean at every layer, read at {read}: "
                        "the pairs show no contrast"
                    )
                vector = SteeringVector(
                    directions=directions,
                    separation=separation,
                    residual_norm={layer: float(residual[k]) for k, layer in enumerate(wanted) if layer in directions},
                    scores=scores,
                    selected=(best_layer(scores, reader.depth),),
                    method=label,
                    read=str(read),
                    name=name,
                    poles=poles,
                    fingerprint=reader.print,
                    pairs_hash=pairs.hash,
                    split_hashes={"fit": pairs.hash} | ({"held_out": held_out.hash} if held_out else {}),
                )
                if label == LEARNED:
                    places = wanted if layers is not None else vector.selected
                    sides = {layer: Sides(m, *(_side(stored, r, layer, f) for f in (0, m))) for layer in places}
                    vector = _learn(reader, vector, sides, items[:n], items[m : m + n], progress)
                found[label, read] = vector
    return found


def _learn(
    reader: _Reader,
    start: SteeringVector,
    sides: dict[int, Sides],
    positive: Sequence[Rendered],
    negative: Sequence[Rendered],
    progress: Progress | None,
) -> SteeringVector:
    """The vector with its directions at the layers of `sides` learned, from the mean difference on.

    Its operating strength is the step that was learned at the selected layer.
    """
    from steer.methods.learned import learned
    from steer.sampling import answered

    n = len(positive)
    texts = answered(reader.model, reader.tokenizer, [*positive, *negative])
    directions, separation, scores, strengths = {}, {}, {}, {}
    for layer, both in sides.items():
        if layer not in start.directions:
            continue
        begin = start.directions[layer] * start.separation[layer]
        shift = learned(reader.model, texts[:n], texts[n:], layer, begin, progress=progress)
        size = float(np.linalg.norm(shift))
        directions[layer] = (shift / size).astype(np.float32)
        up, down = project(both, directions[layer][None])
        separation[layer] = float(up[:n].mean() - down[:n].mean())
        scores[layer] = held_out_score(up[n:, 0], down[n:, 0])
        strengths[layer] = size / separation[layer]
    best = best_layer(scores, reader.depth)
    return replace(
        start,
        directions=directions,
        separation=separation,
        residual_norm={layer: start.residual_norm[layer] for layer in directions},
        scores=scores,
        selected=(best,),
        strength=strengths[best],
    )


def _side(stored: Activations, read: int, layer: int, first: int) -> Callable[[int, int], np.ndarray]:
    return lambda a, b: stored.rows(read, layer, first + a, first + b)


def _one_layer(
    both: Sides, fitted: int, families: Sequence[str], method: Method
) -> tuple[np.ndarray, float, Score] | None:
    """(direction, separation, held-out score) of a layer whose first `fitted` pairs are to be fitted; None without contrast.

    Early layers may know nothing of the contrast yet: in bfloat16 both means are then the same.
    """
    ours = both.part(0, fitted)
    (direction,) = fit(ours, method)
    if direction is None:
        return None
    up, down = project(both, direction[None])
    separation = float(up[:fitted].mean() - down[:fitted].mean())
    if both.count > fitted:
        return direction, separation, held_out_score(up[fitted:, 0], down[fitted:, 0])
    return direction, separation, cross_validated(ours, families, method)


def best_layer(scores: dict[int, Score], depth: int) -> int:
    """The layer with the best held-out score to three digits; of equals the one nearest to the middle."""
    return max(scores, key=lambda layer: (round(scores[layer].mean, 3), -abs(layer - MIDDLE * depth)))
