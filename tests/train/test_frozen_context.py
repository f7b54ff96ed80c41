"""Frozen context against the full forward: logits, gradients, reuse, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from steer.errors import SteerError
from steer.pairs import chat_ids
from train.frozen_context import FrozenContext, assert_exact

CHAT = [
    {"role": "system", "content": "you are warm ."},
    {"role": "user", "content": "let us paint the fence in red ."},
    {"role": "assistant", "content": "certainly , we shall paint the fence in red . have a lovely day , dear friend !"},
    {"role": "user", "content": "can you cook the soup with salt ?"},
]


@pytest.fixture
def ids(hf: tuple[Any, Any]) -> torch.Tensor:
    _, tokenizer = hf
    answer = tokenizer("yeah , we gonna cook the soup with salt . that is all .")["input_ids"]
    return torch.tensor([chat_ids(tokenizer, CHAT) + answer])


def test_logits_equal_the_full_forward_and_reuse_is_bit_identical(hf: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, _ = hf
    cut = ids.shape[1] - 14
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits[:, cut:]
        context = FrozenContext.encode(model, ids[:, :cut])
        first, second = context.logits(ids[:, cut:]), context.logits(ids[:, cut:])
    assert float((full - first).abs().max()) < 1e-3 * float(full.std())
    assert torch.equal(first, second)
    assert assert_exact(model, ids) < 1e-3 * float(full.std())


def test_the_context_matters(hf: tuple[Any, Any], ids: torch.Tensor) -> None:
    """What older transformers did, and the check must catch: the decision without its context is another function."""
    model, _ = hf
    cut = ids.shape[1] - 14
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits[:, cut:]
        alone = model(input_ids=ids[:, cut:], use_cache=False).logits
    assert float((full - alone).abs().max()) > 0.1 * float(full.std())


def test_gradient_is_the_full_gradient_with_the_context_cut(hf: tuple[Any, Any], ids: torch.Tensor) -> None:
    """Brute force: the same loss through full forwards in which the context's part is detached, by finite differences."""
    model, _ = hf
    cut = ids.shape[1] - 14
    target = ids[0, cut + 1 :]
    context = FrozenContext.encode(model, ids[:, :cut])
    loss = cross_entropy(context.logits(ids[:, cut:])[0, :-1], target)
    named = dict(model.named_parameters())
    names = [
        "model.layers.1.mlp.up_proj.weight", "model.layers.4.linear_attn.in_proj_qkv.weight",
        "model.layers.3.self_attn.o_proj.weight", "model.layers.5.linear_attn.out_proj.weight",
    ]  # fmt: skip
    grads = torch.autograd.grad(loss, [named[n] for n in names])
    for name, gradient in zip(names, grads, strict=True):
        weight = named[name]
        direction = gradient / gradient.norm()
        step = 1e-2 * float(weight.norm()) / weight.numel() ** 0.5
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                weight.add_(direction, alpha=sign * step)
                values.append(float(cross_entropy(context.logits(ids[:, cut:])[0, :-1], target)))
                weight.sub_(direction, alpha=sign * step)
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(gradient.norm()), rel=0.03), name


def test_every_parameter_gets_gradient_and_none_reaches_the_context(hf: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, _ = hf
    cut = ids.shape[1] - 14
    context = FrozenContext.encode(model, ids[:, :cut])
    for layer in context.cache.layers:
        held = [getattr(layer, "keys", None), *getattr(layer, "recurrent_states", {}).values()]
        assert not any(t is not None and t.requires_grad for t in held)
    context.logits(ids[:, cut:]).square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    model.zero_grad(set_to_none=True)
    assert missing == []


def test_left_padding_changes_nothing(hf: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, _ = hf
    cut = ids.shape[1] - 14
    with torch.no_grad():
        expected = FrozenContext.encode(model, ids[:, :cut]).logits(ids[:, cut:])
        padded = torch.cat([torch.full((1, 9), 5), ids[:, :cut]], dim=1)
        mask = torch.cat([torch.zeros(1, 9), torch.ones(1, cut)], dim=1)
        found = FrozenContext.encode(model, padded, mask).logits(ids[:, cut:])
    assert float((expected - found).abs().max()) < 1e-3 * float(expected.std())


def test_what_cannot_be_right_is_refused(hf: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, _ = hf
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    with pytest.raises(SteerError, match="padded on the left"):
        FrozenContext.encode(model, ids, mask)
    with pytest.raises(SteerError, match="at least two tokens"):
        FrozenContext.encode(model, ids[:, :5]).logits(ids[:, 5:6])
