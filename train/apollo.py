"""APOLLO: Adam-sized steps from a second moment kept in a random subspace (Zhu et al., arXiv 2412.05270, Algorithm 1).

For a matrix G of m × n (m ≤ n, transposed if taller), with rank r and P of r × m, P_ij ~ N(0, 1/r), drawn anew every
`refresh` steps from (seed, parameter, period) and never stored:

    R = P G;   R̃ = Adam(R), bias-corrected;   s_j = ‖R̃_j‖ / ‖R_j‖ per column  (mode "tensor": one s for all)
    U = G diag(s);   ‖U_t‖ ≤ γ ‖U_{t-1}‖  (norm-growth limiter, with a floor);   W ← W − η (α U + λ W)

s is smaller than full-rank Adam's by √(r/m), so α = √(min(m, n)/r) makes the step Adam-sized; that is the default.
Vectors, convolutions, and matrices whose smaller side is not above the rank take plain Adam: there is nothing to save.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

GROWTH_FLOOR = 0.1  # of a typical Adam-sized ‖U‖, √(r n): below it the limiter does not bind


def projection(seed: int, index: int, period: int, rank: int, m: int, like: Tensor) -> Tensor:
    """P `[rank, m]` for one parameter and refresh period: the same on every device, a function of its arguments only."""
    digest = hashlib.sha256(f"{seed}|{index}|{period}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(rank, m, generator=generator).div_(math.sqrt(rank)).to(like.device)


def adam_direction(
    g: Tensor, mean: Tensor, square: Tensor, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Bias-corrected Adam direction of `g`; `mean` and `square` (float32, of g's shape) are updated in place."""
    mean.lerp_(g, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = (square / (1 - betas[1] ** step)).sqrt_().add_(eps)
    return (mean / (1 - betas[0] ** step)).div_(denominator)


def stochastic_round_(weight: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write float32 `value` into a bfloat16 `weight`, up or down with the probability that keeps the mean."""
    noise = torch.randint(0, 1 << 16, value.shape, generator=generator, dtype=torch.int32).to(value.device)
    bits = value.contiguous().view(torch.int32).add(noise).bitwise_and_(-65536)
    weight.copy_(bits.view(torch.float32))


class Apollo(torch.optim.Optimizer):
    """The optimizer.

    Args:
        params: parameters, `named_parameters()`, or groups.
        lr: step size of an Adam-sized step.
        rank: of the subspace.
        alpha: scale of the projected update; None: √(min(m, n)/rank).
        mode: "channel" (a factor per column) or "tensor" (one factor, APOLLO-Mini; use with a rank of 1 or more).
        refresh: steps between new projections.
        growth: norm-growth limit γ.
        seed: of projections and stochastic rounding.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        rank: int = 256,
        alpha: float | None = None,
        mode: str = "channel",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh: int = 200,
        growth: float = 1.01,
        seed: int = 0,
    ):
        if lr < 0 or rank < 1 or refresh < 1 or growth <= 1 or mode not in ("channel", "tensor"):
            raise ValueError(
                f"Apollo: lr ≥ 0, rank ≥ 1, refresh ≥ 1, growth > 1 and mode channel or tensor are needed; got "
                f"lr={lr}, rank={rank}, refresh={refresh}, growth={growth}, mode={mode!r}"
            )
        self._next_index = 0
        defaults = {
            "lr": lr, "rank": rank, "alpha": alpha, "mode": mode, "betas": betas, "eps": eps,
            "weight_decay": weight_decay, "refresh": refresh, "growth": growth, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also later in training; its parameters are numbered on from the last."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["first_index"] = self._next_index
        self._next_index += len(group["params"])

    @staticmethod
    def projected(parameter: Tensor, rank: int) -> bool:
        """Whether a parameter is projected; the others take plain Adam."""
        return parameter.ndim == 2 and min(parameter.shape) > rank

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for offset, p in enumerate(group["params"]):
                if p.grad is not None:
                    self._update(p, group, group["first_index"] + offset)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[p]
        g = p.grad.float()  # type: ignore[union-attr]
        if not self.projected(p, group["rank"]):
            direction = self._adam(g, state, group)
        else:
            direction = self._projected(g, state, group, index)
        decayed = p.float() * (1 - group["lr"] * group["weight_decay"])
        value = decayed.add_(direction, alpha=-group["lr"])
        if p.dtype == torch.bfloat16:
            seed = hash((group["seed"], index, int(state["step"]))) & ((1 << 62) - 1)
            stochastic_round_(p, value, torch.Generator().manual_seed(seed))
        else:
            p.copy_(value)

    def _adam(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(g), "square": torch.zeros_like(g)}
        state["step"] += 1
        return adam_direction(g, state["mean"], state["square"], int(state["step"]), group["betas"], group["eps"])

    def _projected(self, g: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor:
        tall = g.shape[0] > g.shape[1]
        g = g.T if tall else g  # [m, n], m ≤ n
        m, n = g.shape
        rank = group["rank"]
        if not state:
            zeros = torch.zeros(rank, n, device=g.device)
            state |= {"step": torch.zeros(()), "mean": zeros, "square": zeros.clone(), "norm": torch.zeros(())}
        state["step"] += 1
        step = int(state["step"])
        p = projection(group["seed"], index, (step - 1) // group["refresh"], rank, m, g)
        r = p @ g  # [rank, n]
        adapted = adam_direction(r, state["mean"], state["square"], step, group["betas"], group["eps"])
        if group["mode"] == "channel":
            scale = adapted.norm(dim=0) / r.norm(dim=0).clamp_min(1e-30)  # [n]
        else:
            scale = adapted.norm() / r.norm().clamp_min(1e-30)
        update = g * scale
        norm = float(update.norm())
        if norm > 0:  # a zero gradient must not become the limiter's memory, or the tensor would stand still for good
            previous = float(state["norm"])
            limit = group["growth"] * max(previous, GROWTH_FLOOR * math.sqrt(rank * n))
            if previous > 0 and norm > limit:
                update *= limit / norm
                norm = limit
            state["norm"].fill_(norm)
        alpha = math.sqrt(m / rank) if group["alpha"] is None else group["alpha"]
        update = update * alpha
        return update.T if tall else update
