"""Completions of a Hugging Face model, for pairs that come without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steer.pairs import Rendered

BATCH = 32
RESPONSE_TOKENS = 24


def answered(
    model: Any, tokenizer: Any, items: Sequence[Rendered], max_tokens: int = RESPONSE_TOKENS, batch: int = BATCH
) -> list[Rendered]:
    """The items, those without a response with the model's own greedy one, end-of-text token left out.

    Args:
        model: Hugging Face causal language model.
        tokenizer: whose end-of-text and padding tokens count.
        items: rendered texts.
        max_tokens: longest response.
    """
    found = list(items)
    order = sorted(
        (i for i, item in enumerate(items) if len(item.ids) <= item.prompt_length), key=lambda i: len(items[i].ids)
    )
    end = tokenizer.eos_token_id
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        width = max(len(items[i].ids) for i in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            ids[row, width - len(items[i].ids) :] = torch.tensor(list(items[i].ids))
            mask[row, width - len(items[i].ids) :] = 1
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=end,
            )
        for row, i in enumerate(part):
            new = out[row, width:].tolist()
            if end in new:
                new = new[: new.index(end)]
            # a model that ends at once still gets a response to compare: its end
            found[i] = Rendered([*items[i].ids, *(new or [end])], items[i].prompt_length)
    return found
