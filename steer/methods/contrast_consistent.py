"""Contrast-consistent search: a probe that needs no labels, here as the baseline the labels have to beat.

With p(x) = σ(⟨w, x⟩ + b), over pairs (x⁺, x⁻):

    L = mean [p(x⁺) − (1 − p(x⁻))]² + mean min(p(x⁺), p(x⁻))² + λ ‖w‖²

Burns et al. 2022 (arXiv 2212.03827). Their sides are centred apart, since there either may be the true one; here the positive
side is known, centring would remove the contrast, and so both sides are centred together. The sign, which the loss leaves open, is voted.
"""

from __future__ import annotations

import numpy as np

from steer.errors import NoContrastError
from steer.methods.unit import unit, voted

DECAY = 1e-3  # λ


def contrast_consistent(
    positive: np.ndarray, negative: np.ndarray, restarts: int = 8, steps: int = 100, seed: int = 0
) -> np.ndarray:
    """Unit normal of the best of several searches from random starts.

    Args:
        positive: activations `[n, d_model]`.
        negative: activations of the same pairs `[n, d_model]`.
        restarts: random starts, run side by side.
        steps: of L-BFGS.
        seed: of the starts.

    Returns:
        direction `[d_model]`, float32, unit norm.

    Raises:
        NoContrastError: all differences are zero.
    """
    import torch

    differences = positive.astype(np.float64) - negative
    if not differences.any() or not np.isfinite(differences).all():
        raise NoContrastError("positive and negative activations are the same: the pairs show no contrast here")
    both = np.stack([positive, negative]).astype(np.float64)
    both -= both.mean((0, 1))
    both /= np.sqrt((both**2).sum(-1).mean())
    # all is a combination of the data, so the search runs in its span: at most 2 n dimensions instead of d_model
    flat = both.reshape(-1, both.shape[-1])
    _, size, basis = np.linalg.svd(flat, full_matrices=False)
    basis = basis[size > 1e-10 * size[0]]
    x = torch.tensor(both @ basis.T)  # [2, n, rank]
    start = torch.randn(restarts, len(basis), dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
    w = start.div_(start.norm(dim=1, keepdim=True)).mul_(4.0).requires_grad_()
    b = torch.zeros(restarts, dtype=x.dtype, requires_grad=True)

    def losses() -> torch.Tensor:  # [restarts]
        p = torch.sigmoid(torch.einsum("snr,kr->ksn", x, w) + b[:, None, None])
        consistent = (p[:, 0] + p[:, 1] - 1).square().mean(-1)
        confident = p.amin(1).square().mean(-1)
        return consistent + confident + DECAY * w.square().sum(-1)

    search = torch.optim.LBFGS([w, b], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        search.zero_grad()
        total = losses().sum()
        total.backward()
        return total

    with torch.enable_grad():
        search.step(closure)  # pyright: ignore[reportArgumentType]
    best = int(losses().detach().argmin())
    return unit(voted(w.detach()[best].numpy() @ basis, differences))
