"""How vLLM's two model runners say which request each token of a step belongs to.

`attach` makes a runner call the router: `admit` and `release` as requests come and go, `before` with the step's rows ahead of
every real forward pass, `after` when it is done. V1 is the runner on CPU, V2 the default on GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from steer.engine.router import Router, Row


def attach(runner: Any, router: Router, v2: bool) -> None:
    """Connect a runner to the router. V2 calls it once its model state exists, V1 when the model is loaded."""
    (_attach_v2 if v2 else _attach_v1)(runner, router)


def _attach_v1(runner: Any, router: Router) -> None:
    known: set[str] = set()
    forward = runner._model_forward

    def rows() -> Iterator[Row]:
        batch, starts = runner.input_batch, runner.query_start_loc.np
        for i, request in enumerate(batch.req_ids):
            if request not in known:
                known.add(request)
                params = runner.requests[request].sampling_params
                router.admit(request, params.extra_args if params is not None else None)
            yield Row(
                request,
                int(starts[i]),
                int(starts[i + 1]),
                int(batch.num_computed_tokens_cpu[i]),
                int(batch.num_prompt_tokens[i]),
            )

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        if len(known) > 2 * len(runner.requests) + 64:
            for gone in known - runner.requests.keys():
                router.release(gone)
                known.discard(gone)
        router.before(list(rows()))
        output = forward(*args, **kwargs)
        router.after()
        return output

    runner._model_forward = model_forward


def _attach_v2(runner: Any, router: Router) -> None:
    state = runner.model_state
    prompts: dict[str, int] = {}
    add_request, remove_request, prepare_inputs = state.add_request, state.remove_request, state.prepare_inputs

    def add(req_index: int, new: Any) -> None:
        prompts[new.req_id] = len(new.prompt_token_ids)  # not prefill_token_ids, which grow when a request is preempted
        if new.req_id not in router.specs:
            router.admit(new.req_id, new.sampling_params.extra_args if new.sampling_params is not None else None)
        add_request(req_index, new)

    def remove(req_id: str) -> None:
        prompts.pop(req_id, None)
        router.release(req_id)
        remove_request(req_id)

    def prepare(input_batch: Any, req_states: Any) -> Any:
        starts, computed = input_batch.query_start_loc_np, input_batch.num_computed_tokens_np
        router.after()  # of the step before: its forward pass is in the stream ahead of this one's copies
        router.before(
            Row(request, int(starts[i]), int(starts[i + 1]), int(computed[i]), prompts[request])
            for i, request in enumerate(input_batch.req_ids)
            if request in prompts
        )
        return prepare_inputs(input_batch, req_states)

    state.add_request, state.remove_request, state.prepare_inputs = add, remove, prepare
