"""Interventions on a Hugging Face model: the oracle of the vLLM path, and the teacher in training.

with steered(model, [Intervention(vector, strength=1.5)], prompt_lengths=[12]):
    model(input_ids)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from steer.errors import InterventionError
from steer.intervention import Intervention
from steer.model import decoder_layers


@contextmanager
def steered(
    model: Any, interventions: Sequence[Intervention], prompt_lengths: Sequence[int] | torch.Tensor | None = None
) -> Iterator[Any]:
    """Within the block, the model's forward adds the interventions to the block outputs.

    Positions are those of each row's real tokens: they count on from a cache, and left padding is left out where an
    attention mask says so.

    Args:
        model: Hugging Face causal language model.
        interventions: summed; an empty list changes nothing.
        prompt_lengths: `[batch]`, tokens of each row that are prompt. Needed for the scopes "prompt" and "generated".

    Raises:
        InterventionError: a layer the model lacks, another width, or a scope without `prompt_lengths`.
    """
    blocks = decoder_layers(model)
    width = model.config.get_text_config().hidden_size
    per_layer: dict[int, list[Intervention]] = {}
    for intervention in interventions:
        if intervention.vector.width != width:
            raise InterventionError(f"the vector has width {intervention.vector.width}, the model {width}")
        if intervention.tokens != "all" and prompt_lengths is None:
            raise InterventionError(f'the token scope "{intervention.tokens}" needs prompt_lengths')
        for layer in intervention.at:
            if layer >= len(blocks):
                raise InterventionError(f"layer {layer} does not exist: the model has layers 0 to {len(blocks) - 1}")
            per_layer.setdefault(layer, []).append(intervention)
    lengths = None if prompt_lengths is None else torch.as_tensor(prompt_lengths)
    positions: torch.Tensor | None = None  # [batch, tokens], of the forward pass under way

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        nonlocal positions
        ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        ids = args[0] if ids is None else ids
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            positions = (mask.long().cumsum(1) - 1)[:, -ids.shape[1] :]
        else:
            positions = torch.arange(seen, seen + ids.shape[1], device=ids.device).expand(ids.shape[0], -1)

    def shift(layer: int, like: torch.Tensor) -> torch.Tensor:
        """Σ_k a_k v_k per token, `[batch or 1, tokens or 1, d_model]` float32."""
        total = torch.zeros(1, 1, width, device=like.device)
        for intervention in per_layer[layer]:
            vector = intervention.strength * torch.from_numpy(intervention.shift(layer)).to(like.device)
            if intervention.tokens == "all":
                total = total + vector
            else:
                assert positions is not None
                assert lengths is not None
                prompt = positions < lengths.to(positions.device)[:, None]
                scope = prompt if intervention.tokens == "prompt" else ~prompt
                total = total + scope[..., None].float() * vector
        return total

    def hook_at(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            moved = (hidden.float() + shift(layer, hidden)).to(hidden.dtype)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    handles = [model.model.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [blocks[layer].register_forward_hook(hook_at(layer)) for layer in per_layer]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
