"""Targets: what the teacher says at every decision token, and what the base says of every general text.

Neither ever changes during a distillation, so they are taken once, ahead of the first step, where they fit in memory; otherwise again
for each batch. Each is taken in batches that depend on the data alone, so that a resumed run has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from steer.intervention import Intervention
from steer.reference import steered
from train.data import Decision, pad

BUDGET = 2**30  # bytes of targets kept
BATCH = 32


class Targets:
    """Log-probabilities by index, from memory or computed when asked for.

    Args:
        lengths: tokens of each target.
        vocabulary: width of a row.
        compute: indices → their targets, `[tokens, vocabulary]` each.
        budget: bytes; beyond it nothing is kept.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        vocabulary: int,
        compute: Callable[[Sequence[int]], list[Tensor]],
        budget: int = BUDGET,
    ):
        self._compute = compute
        self._kept: list[Tensor] | None = None
        if 4 * vocabulary * sum(lengths) <= budget:
            order = sorted(range(len(lengths)), key=lambda i: lengths[i])
            kept: dict[int, Tensor] = {}
            for start in range(0, len(order), BATCH):
                indices = order[start : start + BATCH]
                kept |= dict(zip(indices, compute(indices), strict=True))
            self._kept = [kept[i] for i in range(len(lengths))]

    def __call__(self, indices: Sequence[int]) -> list[Tensor]:
        """The targets of these indices."""
        return [self._kept[i] for i in indices] if self._kept is not None else self._compute(indices)


@torch.no_grad()
def answer_log_probs(model: Any, interventions: Sequence[Intervention], batch: Sequence[Decision]) -> list[Tensor]:
    """Log-probabilities `[answer tokens, vocabulary]` that a model, steered or not, gives at each answer token."""
    ids, _ = pad([d.prompt + d.answer for d in batch], left=False)
    with steered(model, interventions, prompt_lengths=[len(d.prompt) for d in batch]):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    starts = [len(d.prompt) - 1 for d in batch]
    return [
        log_softmax(row[start : start + len(d.answer)].float(), -1)
        for row, start, d in zip(logits, starts, batch, strict=True)
    ]


@torch.no_grad()
def text_log_probs(model: Any, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities `[tokens, vocabulary]` after every token of each text."""
    ids, mask = pad(texts, left=False)
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    return [log_softmax(row[: len(t)].float(), -1) for row, t in zip(logits, texts, strict=True)]


def divergence(teacher: Tensor, base: Tensor) -> Tensor:
    """KL(teacher ‖ base) in nats at each token, `[tokens]`: where the vector decides something."""
    return kl_div(base, teacher, reduction="none", log_target=True).sum(-1)
