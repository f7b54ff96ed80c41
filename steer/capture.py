"""Block outputs of a Hugging Face model at chosen token positions.

Batches are of similar length, padded on the right and masked, so that padding enters neither attention nor the GDN
state of a token that is read. Only the positions asked for are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from steer.errors import PairsError, SteerError
from steer.model import decoder_layers
from steer.pairs import Rendered

READS = ("last_prompt", "response_mean", "response_last")
Read = str | int


def read_span(item: Rendered, read: Read) -> tuple[int, int]:
    """Half-open span of token positions that `read` means on `item`.

    Args:
        read: "last_prompt", "response_mean", "response_last", or an index into all tokens (negative from the end).

    Raises:
        PairsError: the item has no such token, for instance no response.
    """
    n = len(item.ids)
    if isinstance(read, int) and not isinstance(read, bool):
        index = read + n if read < 0 else read
        if not 0 <= index < n:
            raise PairsError(f"read position {read} is outside a text of {n} tokens")
        return index, index + 1
    if read == "last_prompt":
        return item.prompt_length - 1, item.prompt_length
    if read not in READS:
        raise SteerError(f'unknown read position "{read}": choose from {", ".join(READS)} or an index')
    if item.prompt_length >= n:
        raise PairsError(f'read position "{read}" needs responses, and a pair has none')
    return (item.prompt_length, n) if read == "response_mean" else (n - 1, n)


def parse_read(text: str) -> Read:
    """A read position from the command line: a name, or an index."""
    return int(text) if text.lstrip("-").isdigit() else text


@torch.no_grad()
def capture(
    model: Any,
    items: Sequence[Rendered],
    layers: Sequence[int] | None = None,
    read: Read = "last_prompt",
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, np.ndarray]:
    """Block outputs at the read position, averaged over its span.

    Args:
        model: Hugging Face causal language model.
        items: rendered texts.
        layers: layer numbers; None: all.
        read: read position, see `read_span`.
        batch_tokens: padded tokens in one forward pass.
        progress: called with (items done, items in all).

    Returns:
        layer → `[len(items), d_model]` float32, in the order of `items`.
    """
    blocks = decoder_layers(model)
    wanted = list(range(len(blocks))) if layers is None else list(layers)
    for layer in wanted:
        if not 0 <= layer < len(blocks):
            raise SteerError(f"layer {layer} does not exist: the model has layers 0 to {len(blocks) - 1}")
    spans = [read_span(item, read) for item in items]
    out = {layer: np.empty((len(items), model.config.get_text_config().hidden_size), np.float32) for layer in wanted}

    batch: list[int] = []

    def collect(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # [batch, tokens, d_model]
            for row, index in enumerate(batch):
                start, end = spans[index]
                out[layer][index] = hidden[row, start:end].float().mean(0).cpu().numpy()

        return hook

    handles = [blocks[layer].register_forward_hook(collect(layer)) for layer in wanted]
    try:
        done = 0
        for batch in _by_length(items, batch_tokens):
            width = max(len(items[i].ids) for i in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, index in enumerate(batch):
                n = len(items[index].ids)
                ids[row, :n] = torch.tensor(items[index].ids)
                mask[row, :n] = 1
            model.model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
            done += len(batch)
            if progress:
                progress(done, len(items))
    finally:
        for handle in handles:
            handle.remove()
    return out


def _by_length(items: Sequence[Rendered], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, each of at most `batch_tokens` padded tokens."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    groups: list[list[int]] = []
    for index in order:
        if groups and len(items[index].ids) * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
