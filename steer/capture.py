"""Block outputs of a Hugging Face model at chosen token positions.

Batches are of similar length, padded and masked, so that padding enters neither attention nor the GDN state of a token that
is read. Only the positions asked for are kept, nothing above the highest layer asked for is computed, and never the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch

from steer.errors import PairsError, SteerError
from steer.model import decoder_layers
from steer.pairs import Rendered

READS = ("last_prompt", "response_mean", "response_last")
Read = str | int
CPU_TOKENS, GPU_TOKENS = 2048, 16384  # padded tokens in one forward pass: what fits the caches, what fills the device


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
    """A read position from the command line: a name, or an index.

    Raises:
        SteerError: neither.
    """
    if text.removeprefix("-").isdigit():
        return int(text)
    if text not in READS:
        raise SteerError(f'unknown read position "{text}": choose from {", ".join(READS)} or an index')
    return text


class _Enough(Exception):
    """Ends a forward pass above the highest layer that is read."""


def captured(
    model: Any,
    items: Sequence[Rendered],
    layers: Sequence[int] | None = None,
    reads: Sequence[Read] = ("last_prompt",),
    batch_tokens: int | None = None,
    padding: Literal["right", "left"] = "right",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Block outputs at several read positions, averaged over their spans, batch by batch as they are computed.

    Args:
        model: Hugging Face causal language model.
        items: rendered texts.
        layers: layer numbers; None: all.
        reads: read positions, see `read_span`; one forward pass serves them all.
        batch_tokens: padded tokens in one forward pass; None: what suits the device.
        padding: side; the values are the same.
        progress: called with (items done, items in all).

    Yields:
        (indices into `items`, values `[reads, layers, batch, d_model]` float32). Every item comes once, in no particular order.

    Raises:
        SteerError: a layer the model lacks, or an unknown read position.
        PairsError: a text without such a position.
    """
    blocks = decoder_layers(model)
    wanted = layer_numbers(layers, len(blocks))
    spans = [[read_span(item, read) for read in reads] for item in items]
    limit = batch_tokens or (GPU_TOKENS if model.device.type == "cuda" else CPU_TOKENS)
    place = {layer: i for i, layer in enumerate(wanted)}
    pool = torch.empty(0)  # [batch, reads, tokens]: averages the spans
    values = torch.empty(0)  # [reads, layers, batch, d_model]

    def collect(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # [batch, tokens, d_model]
            wide = hidden.float()
            for r in range(len(reads)):  # one by one, so that a value does not depend on what else is read
                values[r, place[layer]] = torch.bmm(pool[:, r : r + 1], wide)[:, 0]
            if layer == max(wanted):
                raise _Enough

        return hook

    done, width = 0, model.config.get_text_config().hidden_size
    for batch in _by_length(items, limit):
        longest = max(len(items[i].ids) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        pool = torch.zeros(len(batch), len(reads), longest)
        for row, index in enumerate(batch):
            n = len(items[index].ids)
            first = longest - n if padding == "left" else 0
            ids[row, first : first + n] = torch.tensor(items[index].ids)
            mask[row, first : first + n] = 1
            for k, (start, end) in enumerate(spans[index]):
                pool[row, k, first + start : first + end] = 1.0 / (end - start)
        pool = pool.to(model.device)
        values = torch.empty(len(reads), len(wanted), len(batch), width, device=model.device)
        given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}
        if padding == "left":
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0).to(model.device)
        handles = [blocks[layer].register_forward_hook(collect(layer)) for layer in wanted]
        try:
            with torch.no_grad(), suppress(_Enough):
                model.model(**given)
        finally:
            for handle in handles:
                handle.remove()
        yield batch, values.cpu().numpy()
        done += len(batch)
        if progress:
            progress(done, len(items))


def capture(
    model: Any,
    items: Sequence[Rendered],
    layers: Sequence[int] | None = None,
    read: Read = "last_prompt",
    batch_tokens: int | None = None,
    padding: Literal["right", "left"] = "right",
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, np.ndarray]:
    """Block outputs at one read position, averaged over its span; arguments and errors as of `captured`.

    Returns:
        layer → `[len(items), d_model]` float32, in the order of `items`.
    """
    wanted = layer_numbers(layers, len(decoder_layers(model)))
    out = np.empty((len(wanted), len(items), model.config.get_text_config().hidden_size), np.float32)
    for batch, values in captured(model, items, wanted, (read,), batch_tokens, padding, progress):
        out[:, batch] = values[0]
    return dict(zip(wanted, out, strict=True))


def layer_numbers(layers: Sequence[int] | None, depth: int) -> list[int]:
    """The layers asked for, None being all.

    Raises:
        SteerError: a layer that does not exist, or none at all.
    """
    wanted = list(range(depth)) if layers is None else list(layers)
    for layer in wanted:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < depth:
            raise SteerError(f"layer {layer} does not exist: the model has layers 0 to {depth - 1}")
    if not wanted:
        raise SteerError("a capture needs at least one layer")
    return wanted


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
