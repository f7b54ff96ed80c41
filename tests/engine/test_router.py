"""Taps against the formula token by token, the router's bookkeeping, and both of vLLM's ways to say whose token is whose.

The V2 runner itself needs a GPU (or a Triton for CPU); here its own batch records go through our adapter.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from steer.engine.router import Router, Row
from steer.engine.runners import attach
from steer.engine.taps import Steering
from steer.scope import positions_of

LAYERS, WIDTH, SLOTS = 3, 16, 5


def spec(id_: str, *terms: dict[str, Any], **more: Any) -> dict[str, str]:
    """Extra arguments of a request."""
    full = [{"a": 0.0, "b": 0.0, "keep": False, "tokens": "all"} | t for t in terms]
    return {"steer": json.dumps({"id": id_, "terms": full} | more)}


@pytest.fixture
def router() -> Router:
    torch.manual_seed(0)
    made = Router(Steering(LAYERS, WIDTH, 64, SLOTS, 8, torch.device("cpu")))
    for slot in range(SLOTS):
        unit = torch.nn.functional.normalize(torch.randn(LAYERS, WIDTH), dim=-1)
        at = [0, 1, 2] if slot < 3 else [1]
        made.register(f"v{slot}", slot, {n: (1.0 + slot, unit[n]) for n in at})
    return made


def brute_force(
    router: Router, h: torch.Tensor, layer: int, terms: list[dict[str, Any]], position: int, prompt: int
) -> torch.Tensor:
    """The formula for one token, written as it stands in the design."""
    steering, total, keep = router.steering, torch.zeros(WIDTH), False
    for t in terms:
        low, high = positions_of(tuple(t["tokens"]) if isinstance(t["tokens"], list) else t["tokens"], prompt)
        slot = router.slots[t["key"]]
        v = steering.directions[layer, slot]
        if low <= position < high and bool(v.any()):
            total = total + (t["a"] * steering.separation[layer, slot] + t["b"] * (v @ h)) * v
            keep = keep or t["keep"]
    moved = h + total
    return moved * h.norm() / moved.norm() if keep else moved


def test_a_mixed_step_gives_every_token_its_formula(router: Router) -> None:
    requests = {
        "plain": ([], 0, 7, 7),
        "stacked": (
            [
                {"key": "v0", "a": 0.7, "b": 0.0, "keep": False, "tokens": "all"},
                {"key": "v1", "a": 0.0, "b": -1.0, "keep": False, "tokens": "prompt"},
                {"key": "v0", "a": 0.5, "b": -1.0, "keep": False, "tokens": [2, 6]},
            ],
            3, 9, 8,
        ),
        "kept": ([{"key": "v3", "a": 2.0, "b": 0.0, "keep": True, "tokens": [-3, None]}, {"key": "v2", "a": -1.0, "b": 0.0, "keep": False, "tokens": "all"}], 5, 6, 7),
        "decoding": ([{"key": "v4", "a": 0.0, "b": -2.0, "keep": False, "tokens": "generated"}], 20, 1, 20),
    }  # fmt: skip
    rows, first = [], 0
    for name, (terms, computed, tokens, prompt) in requests.items():
        router.admit(name, spec(name, *terms) if terms else None)
        rows.append(Row(name, first, first + tokens, computed, prompt))
        first += tokens
    router.before(rows)
    for layer in range(LAYERS):
        hidden, residual = torch.randn(first, WIDTH), torch.randn(first, WIDTH)
        given = hidden.clone()
        router.steering.apply(given, residual, layer)
        for row in rows:
            terms = requests[row.request][0]
            for k in range(row.first, row.last):
                expected = brute_force(
                    router, hidden[k] + residual[k], layer, terms, row.computed + k - row.first, row.prompt
                )
                torch.testing.assert_close(given[k] + residual[k], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(given[:7], hidden[:7]), "a plain request's rows keep every bit"
    assert router.counts(["stacked", "kept", "decoding", "plain"]) == [9, 6, 1, 0]
    router.before([Row("plain", 0, 7, 7, 7)])
    left = torch.randn(7, WIDTH)
    again = left.clone()
    router.steering.apply(again, None, 1)
    assert torch.equal(left, again), "nothing of a step is left in the next"


def test_tokens_that_run_again_are_counted_once(router: Router) -> None:
    router.admit("a", spec("a", {"key": "v0", "a": 1.0, "tokens": "all"}))
    for computed, tokens in ((0, 10), (10, 1), (11, 1), (0, 8), (8, 4), (12, 1)):
        router.before([Row("a", 0, tokens, computed, 10)])
    assert router.counts(["a"]) == [13]


def test_an_unknown_vector_leaves_the_count_short(router: Router) -> None:
    router.admit("a", spec("a", {"key": "gone", "a": 1.0, "tokens": "all"}))
    router.before([Row("a", 0, 4, 0, 4)])
    assert router.counts(["a"]) == [0]


def test_captures_average_their_span_over_chunks(router: Router) -> None:
    router.admit("a", spec("a", capture={"layers": [0, 2], "spans": [[3, 9]]}))
    router.admit("b", spec("b", {"key": "v0", "a": 1.0}, capture={"layers": [1], "spans": [[0, 2]]}))
    hidden = torch.randn(LAYERS, 14, WIDTH)
    for chunk in ((0, 5), (5, 12)):
        rows = [Row("a", 0, chunk[1] - chunk[0], chunk[0], 12)]
        if not chunk[0]:
            rows.append(Row("b", 5, 7, 0, 2))
        router.before(rows)
        for layer in range(LAYERS):
            part = hidden[layer, chunk[0] : chunk[1]]
            router.steering.apply(torch.cat([part, hidden[layer, 12:]]) if not chunk[0] else part.clone(), None, layer)
        router.after()
    (raw, tokens), (raw_b, tokens_b), (_, none) = router.captures(["a", "b", "c"])
    assert (tokens, tokens_b, none) == (6, 2, 0)
    np.testing.assert_allclose(
        np.frombuffer(raw, np.float32).reshape(2, WIDTH), hidden[[0, 2], 3:9].mean(1), rtol=1e-5, atol=1e-6
    )
    steered = hidden[1, 12:].mean(0) + router.steering.directions[1, 0]  # what is read is what leaves the layer
    np.testing.assert_allclose(np.frombuffer(raw_b, np.float32), steered, rtol=1e-5, atol=1e-6)


def test_the_v2_runners_batches_become_rows(router: Router) -> None:
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    calls: list[Any] = []
    state = SimpleNamespace(
        add_request=lambda index, new: calls.append(("add", index)),
        remove_request=lambda request: calls.append(("remove", request)),
        prepare_inputs=lambda batch, states: {"prepared": True},
    )
    attach(SimpleNamespace(model_state=state), router, v2=True)
    batch = InputBatch.make_dummy(3, 20, InputBuffers(8, 64, torch.device("cpu")))
    for index, request in enumerate(batch.req_ids[:2]):
        extra = spec(request, {"key": "v0", "a": 1.0, "tokens": "generated"}) if index else None
        params = SimpleNamespace(extra_args=extra)
        prompt, grown = [1] * 9, [1] * 14  # a preempted request's prefill holds part of its answer
        state.add_request(
            index,
            SimpleNamespace(req_id=request, prompt_token_ids=prompt, prefill_token_ids=grown, sampling_params=params),
        )
    batch.num_computed_tokens_np[:] = [0, 5, 0]
    assert state.prepare_inputs(batch, None) == {"prepared": True}
    steered = torch.nonzero(router.steering.add[:, 0]).flatten().tolist()
    starts = batch.query_start_loc_np
    assert steered == list(range(starts[1] + 4, starts[2])), "positions 9 … 11 of the second request"
    state.remove_request(batch.req_ids[1])
    assert calls == [("add", 0), ("add", 1), ("remove", batch.req_ids[1])]
    assert batch.req_ids[1] not in router.specs


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    from steer.engine.refusal import refusal
    from steer.engine.taps import install

    def config(parallel: dict[str, Any], passes: dict[str, Any] | None = None) -> Any:
        base = {"pipeline_parallel_size": 1, "prefill_context_parallel_size": 1, "use_ubatching": False}
        return SimpleNamespace(
            parallel_config=SimpleNamespace(**(base | parallel)),
            compilation_config=SimpleNamespace(pass_config=SimpleNamespace(**(passes or {"enable_sp": False}))),
        )

    assert refusal(config({})) is None
    for parallel, passes, says in (
        ({"pipeline_parallel_size": 2}, None, "pipeline"),
        ({"use_ubatching": True}, None, "micro-batching"),
        ({"prefill_context_parallel_size": 2}, None, "context parallelism"),
        ({}, {"enable_sp": True}, "sequence parallelism"),
    ):
        assert says in str(refusal(config(parallel, passes)))
    steering = Steering(1, WIDTH, 8, 1, 1, torch.device("cpu"))
    layer = torch.nn.Linear(2, 2)
    layer.use_attn_reduce_scatter_for_moe = True  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="shards rows"):
        install(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])}), steering, 1)
    with pytest.raises(RuntimeError, match="found 0 lists"):
        install(torch.nn.ModuleDict({"elsewhere": torch.nn.Linear(2, 2)}), steering, 1)


def test_float32_products_stand_in_for_vllms_bfloat16_kernels() -> None:
    """What a CPU without bfloat16 instructions runs instead of vLLM's own: the same numbers."""
    import vllm._custom_ops  # noqa: F401

    from steer.engine import cpu

    torch.manual_seed(0)
    for heads_k, heads, width, lengths in ((2, 4, 64, [5, 64, 130, 1]), (2, 2, 128, [70])):
        n = sum(lengths)
        q, k = (torch.randn(1, n, heads_k, width).bfloat16() for _ in range(2))
        v, g, beta = (
            torch.randn(1, n, heads, width).bfloat16(),
            -torch.rand(1, n, heads),
            torch.rand(1, n, heads).bfloat16(),
        )
        state = 0.1 * torch.randn(9, heads, width, width)
        bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        slots = torch.tensor([3, 1, 7, 2][: len(lengths)], dtype=torch.int32)
        theirs, ours = state.clone(), state.clone()
        arguments = (True, bounds, False, True, slots)
        expected, _ = torch.ops._C.chunk_gated_delta_rule_cpu(q, k, v, g, beta, theirs, *arguments, 1e-5)
        found, _ = cpu.chunk_gated_delta_rule(q, k, v, g, beta, ours, *arguments)
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.002)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01)
    x, weight, bias = torch.randn(1, 6, 12), torch.randn(6, 1, 4), torch.randn(6)
    expected = torch.nn.functional.conv1d(x, weight, bias, padding=0, groups=6)
    torch.testing.assert_close(cpu.conv1d(x, weight, bias, padding=0, groups=6), expected)
