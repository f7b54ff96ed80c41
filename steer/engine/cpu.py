"""Products on x86 CPUs without bfloat16 instructions: linear layers, convolutions and the chunked delta rule.

vLLM serves in bfloat16 (its GDN kernels on CPU take nothing else). Where the CPU has no AVX512-BF16, oneDNN and torch multiply bfloat16
matrices element by element: measured on a 2-core AVX2 machine, 0.9 GFLOP/s where float32 reaches 136. There each linear layer keeps its weight in
float32 and multiplies so, the short convolution of GDN layers is four multiplications, and their prompts run through float32 products in chunks. Inputs
and outputs stay bfloat16, and sums were float32 before. It costs twice the weights' memory.

`STEER_CPU=stock` leaves vLLM's own.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK = 64


def lacks_bfloat16() -> bool:
    """Whether this is an x86 CPU on which bfloat16 products are emulated."""
    import platform

    return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    """Depthwise convolution without padding in float32: x `[batch, channels, T + K − 1]`, weight `[channels, 1, K]` → `[batch, channels, T]`."""
    assert padding == 0
    assert weight.shape[1] == 1
    taps, wide = weight.shape[-1], x.float()
    length = x.shape[-1] - taps + 1
    out = sum(weight[:, 0, k, None].float() * wide[..., k : k + length] for k in range(taps))
    assert isinstance(out, Tensor)
    return (out if bias is None else out + bias.float()[:, None]).to(x.dtype)


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    output_final_state: bool,
    cu_seqlens: Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
    initial_state_indices: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """vLLM's kernel of this name in float32 torch: S_t = α_t S_{t−1} + k_t β_t (v_t − α_t k_tᵀ S_{t−1}), o_t = q_tᵀ S_t.

    Within a chunk, with γ the summed log decay, S the state before it and D_ij = exp(γ_i − γ_j) for i ≥ j:

        (I + tril(β KKᵀ ∘ D, −1)) U = β (V − exp(γ) K S)
        O = exp(γ) Q S + tril(QKᵀ ∘ D) U         S ← exp(γ_C) S + (exp(γ_C − γ) K)ᵀ U

    Args:
        query, key: `[1, tokens, heads_k, d_k]`; value: `[1, tokens, heads, d_v]`; g (log decay), beta: `[1, tokens, heads]`.
        initial_state: the pool, `[slots, heads, d_k, d_v]`, changed in place at `initial_state_indices` `[sequences]`.
        cu_seqlens: `[sequences + 1]`.
    """
    assert not head_first
    assert output_final_state
    lengths = cu_seqlens.diff().tolist()
    heads, width = value.shape[2], max(lengths)

    def padded(x: Tensor) -> Tensor:
        """[sequences, heads, width (padded with zeros), …] float32."""
        parts = x.float().reshape(-1, *x.shape[2:]).split(lengths)
        out = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        return out.transpose(1, 2)

    q, k, v, decay, b = (padded(x) for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    if q.shape[1] != heads:
        q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    slots = initial_state_indices.long()
    state = initial_state[slots].float()  # [sequences, heads, d_k, d_v]
    outputs = []
    for start in range(0, width, CHUNK):
        q_, k_, v_, b_ = (x[:, :, start : start + CHUNK] for x in (q, k, v, b))
        cumulative = decay[:, :, start : start + CHUNK].cumsum(-1)
        lower = torch.ones(q_.shape[2], q_.shape[2], dtype=torch.bool).tril()
        gaps = (cumulative[..., :, None] - cumulative[..., None, :]).masked_fill(~lower, -torch.inf).exp()
        grown = cumulative.exp()[..., None]
        system = (b_[..., None] * (k_ @ k_.transpose(-1, -2)) * gaps).tril(-1)
        wanted = b_[..., None] * (v_ - grown * (k_ @ state))
        update = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        outputs.append(grown * (q_ @ state) + ((q_ @ k_.transpose(-1, -2)) * gaps) @ update)
        last = cumulative[..., -1:]
        left = (last - cumulative).exp()[..., None] * k_
        state = last.exp()[..., None] * state + left.transpose(-1, -2) @ update
    initial_state[slots] = state.to(initial_state.dtype)
    out = torch.cat(outputs, 2).transpose(1, 2)  # [sequences, width, heads, d_v]
    flat = torch.cat([out[i, :n] for i, n in enumerate(lengths)])
    return flat[None].to(value.dtype), initial_state


def multiply_in_float32() -> None:
    """Wrap vLLM's choice of a linear layer's kernel; nothing where it is not needed, was done, or is not wanted."""
    if os.environ.get("STEER_CPU", "") == "stock" or not lacks_bfloat16():
        return
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.mamba.ops.cpu import causal_conv1d

    stock = utils.dispatch_cpu_unquantized_gemm
    if hasattr(stock, "steer"):
        return

    def dispatch(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        if weight.is_meta or weight.ndim != 2 or weight.dtype != torch.bfloat16:
            stock(layer, remove_weight)
            return
        # persistent, or vLLM would put the old values back when weights are reloaded; it copies into the old storage, which a
        # compiled graph holds
        layer.register_buffer("float32_weight", weight.detach().float(), persistent=True)

        def cpu_linear(x: Tensor, _weight: Any, bias: Tensor | None) -> Tensor:
            return functional.linear(x.float(), layer.float32_weight, None if bias is None else bias.float()).to(
                x.dtype
            )

        layer.cpu_linear = cpu_linear
        if remove_weight:
            layer.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)

    dispatch.steer = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = dispatch
    _custom_ops.chunk_gated_delta_rule_cpu = chunk_gated_delta_rule
    causal_conv1d.F = SimpleNamespace(conv1d=conv1d, silu=functional.silu)  # type: ignore[assignment]
