"""The cost of an intervention, or of changed weights: KL to the base model on neutral text, in nats per token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from steer.intervention import Intervention
from steer.reference import steered


@torch.no_grad()
def neutral_kl(
    base: Any,
    other: Any,
    texts: Sequence[Sequence[int]],
    interventions: Sequence[Intervention] = (),
    batch: int = 16,
) -> float:
    """Mean KL(base ‖ other) over all tokens of the texts, from the full vocabulary.

    Args:
        base: Hugging Face model.
        other: Hugging Face model, the same object for the cost of an intervention alone.
        texts: token lists.
        interventions: applied to `other`.

    Returns:
        nats per token.
    """
    total, count = 0.0, 0
    order = sorted(texts, key=len)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = max(len(r) for r in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        ids, mask = ids.to(base.device), mask.to(base.device)
        p = log_softmax(base(input_ids=ids, attention_mask=mask, use_cache=False).logits.float(), -1)
        lengths = [len(r) for r in rows]
        with steered(other, interventions, prompt_lengths=lengths) if interventions else nullcontext():
            q = log_softmax(other(input_ids=ids, attention_mask=mask, use_cache=False).logits.float(), -1)
        per_token = kl_div(q, p, reduction="none", log_target=True).sum(-1)
        total += float((per_token * mask).sum())
        count += int(mask.sum())
    return total / count
