"""APOLLO against closed forms, an independent reference and AdamW."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from train.apollo import Apollo, projection, stochastic_round_


def reference(
    w: torch.Tensor, grads: list[torch.Tensor], lr: float, rank: int, seed: int, refresh: int
) -> torch.Tensor:
    """Algorithm 1 of arXiv 2412.05270 written out for a wide matrix, with the bias correction before the limiter."""
    m, n = w.shape
    mean, square, last = torch.zeros(rank, n), torch.zeros(rank, n), 0.0
    for t, g in enumerate(grads, 1):
        p = projection(seed, 0, (t - 1) // refresh, rank, m, w)
        r = p @ g
        mean = 0.9 * mean + 0.1 * r
        square = 0.999 * square + 0.001 * r**2
        adam = (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        u = torch.stack([g[:, j] * adam[:, j].norm() / r[:, j].norm() for j in range(n)], dim=1)
        if last and u.norm() > 1.01 * last:
            u = u * (1.01 * last / u.norm())
        last = float(u.norm())
        w = w - lr * math.sqrt(m / rank) * u
    return w


@pytest.mark.parametrize("tall", [False, True])
def test_equals_the_algorithm_written_out(tall: bool) -> None:
    torch.manual_seed(0)
    start = torch.randn(24, 40)
    grads = [torch.randn(24, 40) for _ in range(12)]
    expected = reference(start.clone(), grads, 1e-2, 6, 5, 4)
    p = nn.Parameter((start.T if tall else start).clone())
    optimizer = Apollo([p], lr=1e-2, rank=6, seed=5, refresh=4)
    for g in grads:
        p.grad = (g.T if tall else g).contiguous()
        optimizer.step()
    assert torch.allclose(p.T if tall else p, expected, atol=2e-6)


@pytest.mark.parametrize("rank", [16, 64, 256])
def test_first_step_law(rank: int) -> None:
    """rms(update)/lr = α √(r/m) √(r/(r−2)) for a random gradient; with the default α the first factors cancel."""
    torch.manual_seed(1)
    p = nn.Parameter(torch.zeros(512, 2048))
    optimizer = Apollo([p], lr=1e-3, rank=rank)
    p.grad = torch.randn_like(p)
    optimizer.step()
    rms = float(p.square().mean().sqrt()) / 1e-3
    assert rms == pytest.approx(math.sqrt(rank / (rank - 2)), rel=0.02)


def test_full_rank_vectors_and_convolutions_are_adamw() -> None:
    torch.manual_seed(2)
    shapes = [(8, 16), (12,), (6, 1, 4)]
    mine = [nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    ours = Apollo(mine, lr=1e-2, rank=8, weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(30):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        adamw.step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_zero_gradient_does_not_stop_a_tensor() -> None:
    torch.manual_seed(3)
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = Apollo([p], lr=1.0, rank=8)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert float((p - before).square().mean().sqrt()) > 0.1


def test_a_steady_gradient_is_not_limited_in_short_runs() -> None:
    """A limiter on bias-uncorrected norms would cut the steps of a short run to about 0.6."""
    g = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    moved = []
    for growth in (1.01, 1e9):
        p = nn.Parameter(torch.zeros(64, 64))
        optimizer = Apollo([p], lr=1.0, rank=16, growth=growth)
        for _ in range(20):
            p.grad = g.clone()
            optimizer.step()
        moved.append(float(p.norm()))
    assert moved[0] == pytest.approx(moved[1], rel=0.02)


def test_same_seed_same_bits_and_state_survives_a_file(tmp_path: Path) -> None:
    torch.manual_seed(5)
    grads = [torch.randn(32, 48) for _ in range(10)]

    def run(stop: int | None) -> torch.Tensor:
        p = nn.Parameter(torch.ones(32, 48))
        optimizer = Apollo([p], lr=1e-2, rank=4, refresh=3)
        for i, g in enumerate(grads):
            if i == stop:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                optimizer = Apollo([p], lr=1e-2, rank=4, refresh=3)
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            p.grad = g.clone()
            optimizer.step()
        return p.detach()

    assert torch.equal(run(None), run(None))
    assert torch.equal(run(None), run(5))


def test_no_projection_is_stored() -> None:
    p = nn.Parameter(torch.randn(64, 256))
    optimizer = Apollo([p], rank=16)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert sum(t.numel() for t in optimizer.state[p].values()) == 2 * 16 * 256 + 2


def test_late_groups_and_bad_settings() -> None:
    first, late = nn.Parameter(torch.zeros(32, 32)), nn.Parameter(torch.zeros(32, 32))
    optimizer = Apollo([first], rank=4, lr=1.0)
    optimizer.add_param_group({"params": [late]})
    first.grad = late.grad = torch.randn(32, 32)
    optimizer.step()
    assert not torch.equal(first, late), "each parameter has a projection of its own"
    with pytest.raises(ValueError, match="rank"):
        Apollo([first], rank=0)


def test_bfloat16_weights_keep_small_steps_on_average() -> None:
    weight = torch.ones(200_000, dtype=torch.bfloat16)
    stochastic_round_(weight, torch.full((200_000,), 1.0 + 2**-10), torch.Generator().manual_seed(0))
    assert set(weight.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(weight.float().mean()) - 1 == pytest.approx(2**-10, rel=0.05)
