"""Frozen context: the prompt is run once without gradient; training reads its cache and never writes it.

Attention layers keep keys and values of the context, gated-delta-net layers their convolution and recurrent state. The
decision tokens are then run with gradient on top of that cache, so that time and memory grow with the decision and not
with the context, and no gradient flows into it. Stock Hugging Face overwrites the cache in place, which breaks backward; here the
filled cache is given layers that answer an update with what it would return, and store nothing.

    context = FrozenContext.encode(model, prompt_ids[:, :-1])      # all but the prompt's last token, or the first decision
    logits = context.logits(cat([prompt_ids[:, -1:], decisions]))  # token would get no gradient
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from steer.errors import ModelError, SteerError


class _FrozenAttention(DynamicLayer):
    """Keys and values that grow for the caller only."""

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _FrozenLinearAttention(LinearAttentionLayer):
    """Convolution and recurrent state that stay as the context left them."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        held = self.conv_states[state_idx]
        assert held is not None
        return torch.cat([held, conv_states], dim=-1)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        return recurrent_states


def _freeze(layer: Any, number: int) -> Any:
    kind = {DynamicLayer: _FrozenAttention, LinearAttentionLayer: _FrozenLinearAttention}.get(type(layer))
    if kind is None:
        raise ModelError(f"layer {number}: a frozen context of {type(layer).__name__} is not supported")
    frozen = kind.__new__(kind)
    frozen.__dict__.update(layer.__dict__)
    if isinstance(frozen, LinearAttentionLayer):
        frozen.record_past = True  # sends single tokens through the differentiable convolution as well
    return frozen


class FrozenContext:
    """The cache of a batch of contexts under the weights that made it; make it anew after the weights have moved."""

    def __init__(self, model: Any, cache: Cache, mask: Tensor):
        self.model = model
        self.cache = cache
        self.mask = mask  # [batch, T_context], 0 where padding

    @staticmethod
    @torch.no_grad()
    def encode(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> FrozenContext:
        """Run the contexts without gradient.

        Args:
            model: Hugging Face causal language model.
            input_ids: `[batch, T_context]`, padded on the **left**.
            attention_mask: `[batch, T_context]`, 0 at padding; None: no padding.

        Raises:
            ModelError: the model has a kind of cache layer that cannot be frozen yet (sliding windows, for one).
            SteerError: right padding, which would stand between context and decision.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if not bool(mask[:, -1].all()):
            raise SteerError("contexts must be padded on the left: a row's last token is padding")
        cache = DynamicCache(config=model.config)
        model.model(input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache.layers = [_freeze(layer, number) for number, layer in enumerate(cache.layers)]
        return FrozenContext(model, cache, mask)

    def logits(self, decision_ids: Tensor) -> Tensor:
        """Logits after each decision token, with gradient through these tokens only.

        Args:
            decision_ids: `[batch, T_decision]`, at least two tokens (kernels take a branch without backward for one);
                rows may be padded on the right, the logits of padding mean nothing.

        Returns:
            `[batch, T_decision, vocab]`.
        """
        if decision_ids.shape[1] < 2:
            raise SteerError("a decision needs at least two tokens: the prompt's last and one more")
        mask = torch.cat([self.mask, torch.ones_like(decision_ids)], dim=1)
        out = self.model.model(input_ids=decision_ids, attention_mask=mask, past_key_values=self.cache, use_cache=True)
        return self.model.lm_head(out.last_hidden_state)


@torch.no_grad()
def assert_exact(model: Any, input_ids: Tensor, tolerance: float = 1e-3) -> float:
    """Check on one text `[1, T]` that the frozen context gives the full forward's logits; returns the largest difference.

    Raises:
        ModelError: it does not, relative to the logits' spread, so training would be on another function.
    """
    split = input_ids.shape[1] // 2
    full = model(input_ids=input_ids, use_cache=False).logits[:, split:].float()
    frozen = FrozenContext.encode(model, input_ids[:, :split]).logits(input_ids[:, split:]).float()
    difference = float((full - frozen).abs().max())
    if not difference <= tolerance * max(1.0, float(full.std())):
        raise ModelError(
            f"{type(model).__name__}: logits on a frozen context differ from the full forward's by {difference:.2g}: "
            "this version of transformers drops or changes the cached context"
        )
    return difference
