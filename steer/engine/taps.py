"""Taps: what applies the interventions to each decoder layer's output, in vLLM's own forward pass and compiled graph.

Every token of a step has a row of coefficients, one for each slot of a table of vectors; h is the block output, D_l the table of layer l,
s_l its separations, and P a pooling matrix that averages the tokens to be captured:

    C  = A ∘ s_l + B ∘ (h D_lᵀ)             A, B [tokens, slots]   D_l [slots, d_model]   s_l [slots]
    h' = h + C D_l                          rescaled to ‖h‖ where K [tokens, slots] asks for it
    captured_l = P h'                       P [rows, tokens]

Strength, operation and scope live in A, B and K and so are per-token data; a slot holds a vector, never a setting. Any number of vectors
stack on one token in the same two products. A token whose row is zero gets an exact zero added: no bit of it changes.

The tap is a custom operator that works in place on the layer's output, so that one graph, compiled or not, holds for all settings. Outside of CUDA graphs
it looks at what the step needs and costs nothing where that is nothing; inside them, where Python is gone, it always computes everything.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from steer.intervention import LARGEST_SHIFT


class Steering(nn.Module):
    """The registered buffers all taps share, and what the step under way needs of them.

    Args:
        layers, width: of the model.
        max_tokens: rows in the largest step, padding included.
        slots: vectors the table holds.
        captures: requests whose block outputs one step can pool.
    """

    add: Tensor
    scale: Tensor
    keep: Tensor
    pool: Tensor
    directions: Tensor
    separation: Tensor
    acts: Tensor
    captured: Tensor

    def __init__(self, layers: int, width: int, max_tokens: int, slots: int, captures: int, device: torch.device):
        super().__init__()
        shapes = {
            "add": (max_tokens, slots),
            "scale": (max_tokens, slots),
            "keep": (max_tokens, slots),
            "pool": (captures, max_tokens),
            "directions": (layers, slots, width),
            "separation": (layers, slots),
            "acts": (layers, slots),
            "captured": (layers, captures, width),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device), persistent=False)
        self.used = 0  # slots any token of this step needs: the first `used` ones
        self.scaling = False  # some B is not zero
        self.keeping = False  # some K is not zero
        self.pooled = 0  # rows of P in use
        self.pooled_layers: frozenset[int] = frozenset()

    def write(self, slot: int, layers: dict[int, tuple[float, Tensor]]) -> None:
        """Put a vector into a slot: layer → (separation, unit direction `[d_model]`); it acts at no other layer."""
        self.directions[:, slot].zero_()
        self.separation[:, slot].zero_()
        self.acts[:, slot].zero_()
        for layer, (separation, direction) in layers.items():
            self.directions[layer, slot].copy_(direction)
            self.separation[layer, slot] = separation
            self.acts[layer, slot] = 1.0

    def apply(self, hidden: Tensor, residual: Tensor | None, layer: int) -> None:
        """Change `hidden` [tokens, d_model] in place, so that `hidden + residual` is h'; pool h' where the step asks for it."""
        everything = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
        used = self.add.shape[1] if everything else self.used
        pooled = self.pool.shape[0] if everything else self.pooled if layer in self.pooled_layers else 0
        if not used and not pooled:
            return
        n = hidden.shape[0]
        if used:
            self._steer(hidden, residual, layer, used, everything)
        if pooled:
            h = hidden.float() if residual is None else hidden.float() + residual.float()
            torch.matmul(self.pool[:pooled, :n], h, out=self.captured[layer, :pooled])

    def _steer(self, hidden: Tensor, residual: Tensor | None, layer: int, used: int, everything: bool) -> None:
        n, half = hidden.shape[0], hidden.float()
        h = half if residual is None else half + residual.float()
        table = self.directions[layer, :used]
        coefficients = self.add[:n, :used] * self.separation[layer, :used]
        if everything or self.scaling:
            coefficients = coefficients + self.scale[:n, :used] * (h @ table.T)
        shift = coefficients.clamp(-LARGEST_SHIFT, LARGEST_SHIFT) @ table
        if everything or self.keeping:
            kept = (self.keep[:n, :used] @ self.acts[layer, :used]) > 0
            moved = h + shift
            ratio = h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            shift = torch.where(kept[:, None], moved * ratio - h, shift)
        hidden.copy_(half + shift)


_served: weakref.ref[Steering] | None = None  # the one of this process; its model owns it


def _tap(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    steering = _served() if _served is not None else None
    if steering is not None:
        steering.apply(hidden, residual, layer)


def _tap_shape(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    return None


_library = torch.library.Library("steer", "DEF")
_library.define("tap(Tensor(a!) hidden, Tensor? residual, int layer) -> ()")
for _key in ("CPU", "CUDA"):
    _library.impl("tap", _tap, _key)
_library._register_fake("tap", _tap_shape)


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The language model's decoder layers, found by structure.

    Raises:
        RuntimeError: there is not exactly one list of `count` layers, so the model cannot be steered.
    """
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and name.rsplit(".", 1)[-1] in ("layers", "h", "blocks")
        and "visual" not in name
    ]
    if len(lists) != 1:
        raise RuntimeError(
            f"{type(model).__name__}: found {len(lists)} lists of {count} decoder layers, cannot be steered"
        )
    return lists[0]


def install(model: nn.Module, steering: Steering, count: int) -> None:
    """Put a tap on each decoder layer. Must run before the model is compiled: a later hook is silently ignored.

    A layer returns `hidden`, which is the block output, or a pair `(hidden, residual)` whose sum is.

    Raises:
        RuntimeError: the layers are not found, their rows are sharded, or this process serves a model already.
    """
    global _served
    if _served is not None and _served() is not None:
        raise RuntimeError("one process steers one model: start the second engine in a process of its own")
    for number, layer in enumerate(decoder_layers(model, count)):
        if getattr(layer, "use_attn_reduce_scatter_for_moe", False):
            raise RuntimeError("steering is refused with use_attn_reduce_scatter_for_moe, which shards rows by token")

        def hook(_layer: nn.Module, _args: Any, output: Any, number: int = number) -> Any:
            pair = isinstance(output, tuple)
            torch.ops.steer.tap(output[0] if pair else output, output[1] if pair else None, number)
            return output

        layer.register_forward_hook(hook)
    model.register_module("steer", steering)
    _served = weakref.ref(steering)
