"""Taps: what adds the interventions to each decoder layer's output, in vLLM's own forward pass and compiled graph.

Per step every token has a row of coefficients, one for each slot of a table of vectors:

    h' = h + C T_l        C [tokens, slots] float32,  T_l [slots, d_model] float32 of layer l

Strength and scope live in C and so are per-token data; a slot holds a vector, never a setting. Any number of vectors stack on one
token in the same product. Tokens of unsteered requests have zero rows, and adding an exact zero changes no bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Tap(nn.Module):
    """One layer's table `[slots, d_model]`, and the coefficients `[max_tokens, slots]` all layers share."""

    table: torch.Tensor
    coefficients: torch.Tensor

    def __init__(self, coefficients: torch.Tensor, width: int):
        super().__init__()
        table = torch.zeros(coefficients.shape[1], width, dtype=torch.float32, device=coefficients.device)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("coefficients", coefficients, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states `[tokens, d_model]` plus what their rows of coefficients ask for."""
        return (hidden.float() + self.coefficients[: hidden.shape[0]] @ self.table).to(hidden.dtype)


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


def install(model: nn.Module, count: int, width: int, max_tokens: int, slots: int, device: torch.device) -> list[Tap]:
    """Put a tap on each decoder layer. Must run before the model is compiled: a later hook is silently ignored.

    A layer returns `hidden` or a pair `(hidden, residual)` whose sum is the block output; the shift goes on `hidden`.
    """
    coefficients = torch.zeros(max_tokens, slots, dtype=torch.float32, device=device)
    taps = []
    for layer in decoder_layers(model, count):
        tap = Tap(coefficients, width)
        layer.register_module("steer_tap", tap)

        def hook(_layer: nn.Module, _args: Any, output: Any, tap: Tap = tap) -> Any:
            if isinstance(output, tuple):
                return (tap(output[0]), *output[1:])
            return tap(output)

        layer.register_forward_hook(hook)
        taps.append(tap)
    return taps
