"""Interventions on a Hugging Face model: the oracle of the vLLM path, and the teacher in training.

with steered(model, [Intervention(vector, strength=1.5)], prompt_lengths=[12]):
    model(input_ids)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steer.errors import InterventionError
from steer.intervention import LARGEST_SHIFT, Gate, Intervention
from steer.model import decoder_layers
from steer.scope import needs_prompt_length, positions_of


@contextmanager
def steered(
    model: Any, interventions: Sequence[Intervention], prompt_lengths: Sequence[int] | Tensor | None = None
) -> Iterator[Any]:
    """Within the block, the model's forward applies the interventions to the block outputs.

    Positions are those of each row's real tokens: they count on from a cache, and left padding is left out where an
    attention mask says so. A gate is decided in a forward pass that begins at position 0, by a plain pass over the same tokens, and
    holds for the passes that go on from its cache.

    Args:
        model: Hugging Face causal language model.
        interventions: summed; an empty list changes nothing.
        prompt_lengths: `[batch]`, tokens of each row that are prompt. Needed for gates and for scopes that depend on it.

    Raises:
        InterventionError: a layer the model lacks, another width, a scope or gate without `prompt_lengths`, or a
            pass that goes on from a cache before any gate was decided.
    """
    blocks = decoder_layers(model)
    per_layer = _by_layer(interventions, model.config.get_text_config().hidden_size, len(blocks))
    if prompt_lengths is None:
        for i in interventions:
            if i.when or needs_prompt_length(i.tokens):
                raise InterventionError(
                    f'the token scope "{i.tokens}"{" with a gate" if i.when else ""} needs prompt_lengths'
                )
    lengths = None if prompt_lengths is None else torch.as_tensor(prompt_lengths)
    gates = {id(i): i.when for i in interventions if i.when}
    opened: dict[int, Tensor] = {}  # intervention → [batch] bool
    positions: Tensor | None = None  # [batch, tokens], of the forward pass under way
    probing = False

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        nonlocal positions, probing
        if probing:
            return
        ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        ids = args[0] if ids is None else ids
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            positions = (mask.long().cumsum(1) - 1)[:, -ids.shape[1] :]
        else:
            positions = torch.arange(seen, seen + ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
        if gates and seen == 0:
            assert lengths is not None
            assert positions is not None
            probing = True
            try:
                plain = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
                last = positions == (lengths.to(positions.device) - 1)[:, None]  # one token a row
                if int(last.sum()) != len(lengths):
                    raise InterventionError("a gate needs the whole prompt in the first forward pass")
                opened.update(_decide(model, blocks, gates, args, plain, last))
            finally:
                probing = False
        elif gates and not opened:
            raise InterventionError(
                "a gate is decided on the prompt, and this pass goes on from a cache made outside the block"
            )

    def active(i: Intervention) -> Tensor | float:
        """1 where the intervention applies, `[batch, tokens, 1]` or a number for everywhere."""
        scope: Tensor | float = 1.0
        if i.tokens != "all":
            assert positions is not None
            if lengths is None:
                start, end = positions_of(i.tokens, 0)
                scope = ((positions >= start) & (positions < end)).float()[..., None]
            else:
                spans = torch.tensor([positions_of(i.tokens, int(n)) for n in lengths], device=positions.device)
                scope = ((positions >= spans[:, :1]) & (positions < spans[:, 1:])).float()[..., None]
        return scope * opened[id(i)].float()[:, None, None] if i.when else scope

    def hook_at(layer: int) -> Any:
        terms = per_layer[layer]

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            if probing:
                return output
            hidden = output[0] if isinstance(output, tuple) else output
            h = hidden.float()
            total, keep = torch.zeros_like(h), torch.zeros_like(h[..., :1])
            for i in terms:
                v = torch.from_numpy(i.vector.directions[layer]).float().to(h.device)
                a, b = i.coefficients
                on = active(i)
                shift = on * (a * i.vector.separation[layer] + b * (h @ v)[..., None])
                total = total + shift.clamp(-LARGEST_SHIFT, LARGEST_SHIFT) * v
                keep = torch.maximum(keep, on * torch.full_like(keep, float(i.preserve_norm)))
            moved = h + total
            ratio = h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            result = torch.where(keep > 0, moved * ratio, moved).to(hidden.dtype)
            return (result, *output[1:]) if isinstance(output, tuple) else result

        return hook

    handles = [model.model.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [blocks[layer].register_forward_hook(hook_at(layer)) for layer in per_layer]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _by_layer(interventions: Sequence[Intervention], width: int, layers: int) -> dict[int, list[Intervention]]:
    """layer → the interventions that act there, if the model has such layers and width."""
    found: dict[int, list[Intervention]] = {}
    for i in interventions:
        for vector in [i.vector, *([i.when.vector] if i.when else [])]:
            if vector.width != width:
                raise InterventionError(f"the vector has width {vector.width}, the model {width}")
        for layer in [*i.at, *([i.when.at] if i.when else [])]:
            if not 0 <= layer < layers:
                raise InterventionError(f"layer {layer} does not exist: the model has layers 0 to {layers - 1}")
        for layer in i.at:
            found.setdefault(layer, []).append(i)
    return found


@torch.no_grad()
def _decide(
    model: Any, blocks: Any, gates: dict[int, Gate], args: Any, kwargs: dict[str, Any], last: Tensor
) -> dict[int, Tensor]:
    """For each gate, `[batch]` bool: open or closed, by a plain pass; `last` marks the last prompt tokens, `[batch, tokens]`."""
    read: dict[int, Tensor] = {}

    def reader(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            read[layer] = hidden[last].float()  # [batch, d_model]

        return hook

    handles = [blocks[layer].register_forward_hook(reader(layer)) for layer in {g.at for g in gates.values()}]
    try:
        model.model(*args, **kwargs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    decided = {}
    for key, gate in gates.items():
        v = torch.from_numpy(gate.vector.directions[gate.at]).float().to(read[gate.at].device)
        decided[key] = ((read[gate.at] @ v) > gate.threshold) == gate.above
    return decided
