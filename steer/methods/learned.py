"""A learned direction: optimised on what steering is for, instead of read off.

For a pair with prompts x⁺, x⁻ and responses y⁺, y⁻, and the block output of one layer moved by v at every token,

    L(v) = −log σ(β [ Δ(y⁺ | x⁻, +v) − Δ(y⁻ | x⁻, +v) ]) − log σ(β [ Δ(y⁻ | x⁺, −v) − Δ(y⁺ | x⁺, −v) ]),
    Δ(y | x, v) = log π(y | x, v) − log π(y | x)

With x⁺ = x⁻ this is BiPO (Cao et al. 2024, arXiv 2406.00045): the vector prefers one response, its opposite the other. Where the
prompts differ, say by a system instruction, each side is asked for the other side's response: +v must do what the instruction does.
Probes detect well and steer badly; a direction trained on the intervention does both (ReFT-r1, AxBench, arXiv 2501.17148).

The weights are left alone; only v has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steer.errors import PairsError
from steer.model import decoder_layers
from steer.pairs import Rendered

BETA = 0.5
STEP = 0.1  # the first step's length over the starting shift's


def learned(
    model: Any,
    positive: Sequence[Rendered],
    negative: Sequence[Rendered],
    layer: int,
    start: np.ndarray,
    steps: int = 40,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The shift of a layer's block output that makes the model prefer the positive response, and its opposite the negative one.

    Args:
        model: Hugging Face causal language model.
        positive: sides with responses.
        negative: sides of the same pairs with responses.
        layer: where v is added.
        start: shift to start from `[d_model]`, in activation units: separation times the mean difference.
        steps: of Adam, with a step size that falls to zero.
        batch: pairs a step.
        seed: of the order of the pairs.
        progress: called with (steps done, steps in all).

    Returns:
        shift `[d_model]`, float32, in activation units; its norm is the step the objective found best.

    Raises:
        PairsError: a side has no response.
    """
    for side in (*positive, *negative):
        if len(side.ids) <= side.prompt_length:
            raise PairsError('the method "learned" needs responses, and a pair has none')
    device, scale = model.device, float(np.linalg.norm(start))
    v = torch.tensor(start, dtype=torch.float32, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=STEP * scale / math.sqrt(len(start)))
    order = torch.Generator().manual_seed(seed)
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    objective = Objective(model, positive, negative, layer)
    try:
        queue: list[int] = []
        for step in range(steps):
            if len(queue) < min(batch, len(positive)):
                queue += torch.randperm(len(positive), generator=order).tolist()
            chosen, queue = queue[:batch], queue[batch:]
            for group in optimizer.param_groups:
                group["lr"] = STEP * scale / math.sqrt(len(start)) * (1 - step / steps)
            with torch.enable_grad():
                (v.grad,) = torch.autograd.grad(objective(v, chosen), v)
            optimizer.step()
            if progress:
                progress(step + 1, steps)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return v.detach().cpu().numpy()


class Objective:
    """L(v) on some pairs. What the model gives without v is computed once a pair."""

    def __init__(self, model: Any, positive: Sequence[Rendered], negative: Sequence[Rendered], layer: int):
        self.model, self.layer = model, layer
        # of each pair: (y⁺, y⁻) after x⁻, which +v acts on, and (y⁻, y⁺) after x⁺, which −v acts on
        self.texts = [
            ((_after(n, p), n), (_after(p, n), p)) for p, n in zip(positive, negative, strict=True)
        ]  # fmt: skip
        self._plain: dict[int, Tensor] = {}

    def __call__(self, v: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """Mean of L(v) over the chosen pairs, all of them by default."""
        rows = list(range(len(self.texts)) if chosen is None else chosen)
        new = [i for i in rows if i not in self._plain]
        if new:
            with torch.no_grad():
                self._plain.update(zip(new, self._log_probabilities(new), strict=True))
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0], device=v.device).repeat(len(rows))
        with _moved(self.model, self.layer, signs[:, None, None] * v):
            moved = self._log_probabilities(rows)
        gain = moved - torch.stack([self._plain[i] for i in rows])  # [pairs, 4]
        margins = torch.stack([gain[:, 0] - gain[:, 1], gain[:, 2] - gain[:, 3]])
        return -logsigmoid(BETA * margins).sum(0).mean()

    def _log_probabilities(self, rows: Sequence[int]) -> Tensor:
        """`[pairs, 4]`: (y⁺, y⁻) after x⁻, (y⁻, y⁺) after x⁺."""
        texts = [text for i in rows for side in self.texts[i] for text in side]
        return response_log_probability(self.model, texts).reshape(len(rows), 4)


def _after(prompt: Rendered, response: Rendered) -> Rendered:
    """The response of one text after the prompt of another."""
    kept = [*prompt.ids[: prompt.prompt_length], *response.ids[response.prompt_length :]]
    return Rendered(kept, prompt.prompt_length)


def response_log_probability(model: Any, items: Sequence[Rendered]) -> Tensor:
    """log π(response | prompt), the sum over the response's tokens, for each item `[len(items)]`, in nats.

    Rows are padded on the left and masked, so that the responses end together and only their logits are computed.
    """
    width = max(len(i.ids) for i in items)
    keep = max(len(i.ids) - i.prompt_length for i in items)
    ids = torch.zeros(len(items), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    counted = torch.zeros(len(items), keep)
    for row, item in enumerate(items):
        n, tail = len(item.ids), len(item.ids) - item.prompt_length
        ids[row, width - n :] = torch.tensor(list(item.ids))
        mask[row, width - n :] = 1
        counted[row, keep - tail :] = 1
    ids, mask, counted = ids.to(model.device), mask.to(model.device), counted.to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep + 1)
    chosen = ids[:, -keep:, None]
    logits = out.logits[:, -keep - 1 : -1].float()
    return ((logits.gather(-1, chosen)[..., 0] - logits.logsumexp(-1)) * counted).sum(-1)


@contextmanager
def _moved(model: Any, layer: int, shift: Tensor) -> Iterator[None]:
    """The block output of `layer` moved by `shift` at every token, with gradient."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        moved = hidden + shift.to(hidden.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
