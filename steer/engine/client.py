"""The steering client: what stands between a request and vLLM's async engine, whoever makes the request.

It checks the interventions against the model, decides their gates, holds their vectors in the workers' tables, salts the prefix
cache, and counts what was steered. `Engine`, our HTTP routes and the plugin in `vllm serve` all go through it. Its methods run on the loop of the
engine it was made for.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from steer.engine.result import Receipt
from steer.engine.slots import MOST_SPANS, PoolRows, VectorSlots, key_of, pool_rows
from steer.errors import InterventionError, RefusedError
from steer.fingerprint import Fingerprint
from steer.intervention import Intervention, Resolve, hash_of, parse
from steer.scope import positions_of

WINDOW = 256  # captures under way at once


@dataclass
class Tally:
    """Counters since the start, for `/metrics`."""

    requests: int = 0
    steered_requests: int = 0
    refused: int = 0
    tokens_generated: int = 0
    tokens_steered: int = 0
    tokens_cached: int = 0
    captures: int = 0


@dataclass
class Plan:
    """A request's interventions, with their gates decided.

    Attributes:
        asked: as they came.
        acting: those that act: the ungated and those with an open gate, gates taken off.
        gates: records for the receipt.
    """

    asked: Sequence[Intervention]
    acting: list[Intervention]
    gates: list[dict[str, Any]] = field(default_factory=list)


def covered(interventions: Sequence[Intervention], prompt: int, start: int, end: int) -> int:
    """How many of the positions [start, end) any of the interventions covers."""
    spans = sorted(positions_of(i.tokens, prompt) for i in interventions)
    total, reached = 0, start
    for low, high in spans:
        low, high = max(low, reached), min(high, end)
        if low < high:
            total, reached = total + high - low, high
    return total


class Resolved(str):
    """A spec that a client made, as opposed to text that came with a request."""


def spec_of(spec_id: str, acting: Sequence[Intervention], **more: Any) -> Resolved:
    """What the worker's router is told of a request, as JSON."""
    terms = []
    for i in acting:
        a, b = i.coefficients
        terms.append({"key": key_of(i), "a": a, "b": b, "keep": i.preserve_norm, "tokens": i.tokens})
    return Resolved(json.dumps({"id": spec_id, "terms": terms} | more))


class SteeringClient:
    """Steering on one vLLM engine.

    Args:
        llm: vLLM's async engine, whose workers are `SteerWorker`s.
        fingerprint: of the served model.
        slots: size of the workers' tables.
    """

    def __init__(self, llm: Any, fingerprint: Fingerprint, slots: int):
        self.llm = llm
        self.fingerprint = fingerprint
        self.lineage = {fingerprint.weights}
        self.weight_version = 0
        self.layers = 0
        self.tally = Tally()
        self.vectors = VectorSlots(slots, self.rpc)
        self.rows = PoolRows(pool_rows(llm.vllm_config.scheduler_config.max_num_seqs))
        self._waiting: dict[str, asyncio.Future[int]] = {}
        self._counting: asyncio.Task[None] | None = None

    async def rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of every worker; their answers."""
        return await self.llm.collective_rpc(method, args=args, kwargs=kwargs)

    async def begin(self) -> None:
        """Ask the workers how many layers they tapped.

        Raises:
            RefusedError: the workers are not ours.
        """
        try:
            self.layers = int((await self.rpc("steer_layers"))[0])
        except Exception as error:
            raise RefusedError(
                f"vLLM's workers cannot steer: start them with worker_cls=SteerWorker ({error})"
            ) from None

    def check(self, interventions: Sequence[Intervention]) -> None:
        """Refuse what cannot be honoured: another width, model or layer.

        Raises:
            InterventionError: says which vector and what of it does not fit.
        """
        for i in interventions:
            if not isinstance(i, Intervention):
                raise InterventionError(f"an Intervention is wanted, not {type(i).__name__}")
            for v, layers in [(i.vector, i.at), *([(i.when.vector, (i.when.at,))] if i.when else [])]:
                if v.width != self.fingerprint.width:
                    raise InterventionError(
                        f'vector "{v.name}" has width {v.width}, the model {self.fingerprint.width}', "vector"
                    )
                missing = [layer for layer in layers if not 0 <= layer < self.layers]
                if missing:
                    raise InterventionError(
                        f"layer {missing[0]} does not exist: the model has layers 0 to {self.layers - 1}", "layers"
                    )
                differs = v.fingerprint.differences(self.fingerprint)
                if v.fingerprint.weights in self.lineage:
                    differs = [d for d in differs if not d.startswith("weights ")]
                if differs and not v.mismatch_allowed:
                    reason = f'vector "{v.name}" was made on another model: {"; ".join(differs)}'
                    raise InterventionError(reason, "vector")

    def parse(self, given: Any, resolve: Resolve) -> list[Intervention]:
        """Interventions as they come in over HTTP, checked against the model; `resolve` finds the vector that is named.

        Raises:
            InterventionError: its `field` is `steering[index].name`.
        """
        found = parse(given, resolve)
        for index, one in enumerate(found):
            try:
                self.check([one])
            except InterventionError as error:
                raise InterventionError(str(error), f"steering[{index}].{error.field}") from None
        return found

    def salt(self, interventions: Sequence[Intervention], given: str | None = None) -> str:
        """Prefix-cache salt: requests share blocks only under the same interventions, vectors and weights (and salt of their own)."""
        own = hash_of(interventions) if interventions else "plain"
        return f"w{self.weight_version}:{own}" + (f":{given}" if given else "")

    # -- a request ------------------------------------------------------------------------------------------------

    async def plan(self, ids: Sequence[int], interventions: Sequence[Intervention]) -> Plan:
        """Decide the gates by a plain pass over the prompt; all gates of a request in one pass."""
        gates = [i.when for i in interventions if i.when]
        if not gates:
            return Plan(interventions, list(interventions))
        layers = sorted({g.at for g in gates})
        read = (await self.capture([(list(ids), [(len(ids) - 1, len(ids))])], layers))[0, 0]
        acting, records = [], []
        for i in interventions:
            if i.when is None:
                acting.append(i)
                continue
            value = i.when.value(read[layers.index(i.when.at)])
            is_open = i.when.open(value)
            records.append({"intervention": i.hash, "value": value, "threshold": i.when.threshold, "open": is_open})
            if is_open:
                acting.append(Intervention(i.vector, i.strength, i.op, i.layers, i.tokens, i.preserve_norm))
        return Plan(interventions, acting, records)

    async def run(
        self,
        prompt: dict[str, Any],
        interventions: Sequence[Intervention],
        params: Any,
        request_id: str,
        **options: Any,
    ) -> AsyncIterator[tuple[Any, Receipt]]:
        """vLLM's outputs for one request, each with its receipt; the last has the tokens steered.

        Args:
            prompt: vLLM's prompt, with `prompt_token_ids`.
            interventions: checked already.
            params: vLLM's SamplingParams; its `extra_args` are replaced.
            options: to vLLM's `generate`.

        Raises:
            RefusedError: no slot is free for a vector, or fewer tokens were steered than the interventions cover.
        """
        ids = prompt["prompt_token_ids"]
        plan = await self.plan(ids, interventions)
        acting, spec_id = plan.acting, uuid.uuid4().hex
        if acting:
            params.extra_args = {**(params.extra_args or {}), "steer": spec_of(spec_id, acting)}
        made: dict[int, int] = {}
        self.tally.requests += 1
        self.tally.steered_requests += bool(acting)
        async with self.vectors.hold(acting):
            version = self.weight_version
            salted = {**prompt, "cache_salt": self.salt(acting, prompt.get("cache_salt"))}
            cached = 0
            async for output in self.llm.generate(salted, params, request_id, **options):
                for answer in output.outputs:
                    n = len(answer.token_ids)
                    made[answer.index] = made.get(answer.index, 0) + n if params.output_kind.name == "DELTA" else n
                cached = max(cached, output.num_cached_tokens or 0)
                steered = 0
                if output.finished:
                    steered = await self._steered(spec_id, acting, len(ids), cached, list(made.values()))
                yield output, self._receipt(plan, version, steered, cached)
        self.tally.tokens_generated += sum(made.values())
        self.tally.tokens_cached += cached

    async def _steered(
        self, spec_id: str, acting: Sequence[Intervention], prompt: int, cached: int, made: Sequence[int]
    ) -> int:
        """Tokens steered in a finished request: those of its final sequences, if the workers counted as many."""
        if not acting:
            return 0
        in_prompt = covered(acting, prompt, cached, prompt)
        due = in_prompt + sum(covered(acting, prompt, prompt, prompt + n - 1) for n in made)
        counted = await self._count(spec_id)
        if counted < due:
            self.tally.refused += 1
            raise RefusedError(f"only {counted} of {due} tokens were steered, so the answer is withheld")
        # a step that was under way when the answer ended may have run one token more
        steered = min(counted, due + in_prompt * (len(made) - 1))
        self.tally.tokens_steered += steered
        return steered

    def _receipt(self, plan: Plan, version: int, steered: int, cached: int) -> Receipt:
        vectors = {v.hash for i in plan.asked for v in (i.vector, *([i.when.vector] if i.when else []))}
        return Receipt(
            interventions=tuple(i.record() for i in plan.asked),
            intervention_hash=hash_of(plan.asked) if plan.asked else "",
            weight_version=version,
            weights_changed=version != self.weight_version,
            tokens_steered=steered,
            tokens_cached=cached,
            vector_hashes=tuple(sorted(vectors)),
            gates=tuple(plan.gates),
        )

    async def _count(self, spec_id: str) -> int:
        """Tokens steered in a request, the least over the workers. Calls that come while one is under way share the next."""
        future = self._waiting[spec_id] = asyncio.get_running_loop().create_future()
        if self._counting is None or self._counting.done():
            self._counting = asyncio.create_task(self._collect())
        return await future

    async def _collect(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting, {}
            try:
                per_worker = await self.rpc("steer_counts", list(asked))
                for future, counts in zip(asked.values(), zip(*per_worker, strict=True), strict=True):
                    if not future.done():
                        future.set_result(min(counts))
            except BaseException as error:
                for future in asked.values():
                    if not future.done():
                        future.set_exception(error)
                if not isinstance(error, Exception):
                    raise

    # -- capture --------------------------------------------------------------------------------------------------

    async def capture(
        self,
        items: Sequence[tuple[list[int], Sequence[tuple[int, int]]]],
        layers: Sequence[int],
        interventions: Sequence[Intervention] = (),
    ) -> np.ndarray:
        """Block outputs averaged over spans of positions [start, end), for each (token ids, spans); every item has as many spans.

        Every token is computed anew, none comes from the prefix cache. To the interventions the whole text is prompt.

        Returns:
            `[items, spans, layers, d_model]` float32.

        Raises:
            InterventionError: an intervention with a gate, or one that covers no token of a text.
            RefusedError: a text longer than the engine holds, too many spans, or the workers pooled fewer tokens than asked.
        """
        for i in interventions:
            if i.when is not None:
                raise InterventionError("a capture has no moment to decide a gate at: take it off", "when")
            if not all(covered([i], len(ids), 0, len(ids)) for ids, _ in items):
                raise InterventionError(
                    f"tokens {i.tokens!r} covers none of a text that is read: all of it is prompt", "tokens"
                )
        if any(not 0 < len(spans) <= MOST_SPANS for _, spans in items):
            raise RefusedError(f"a capture reads at 1 to {MOST_SPANS} positions of a text")
        parts = []
        for start in range(0, len(items), WINDOW):
            window = items[start : start + WINDOW]
            ids = await asyncio.gather(*(self._capture_one(*item, layers, interventions) for item in window))
            taken = (await self.rpc("steer_captures", ids))[0]
            for (_, spans), (raw, tokens) in zip(window, taken, strict=True):
                asked = sum(high - low for low, high in spans)
                if tokens != asked:
                    raise RefusedError(f"only {tokens} of {asked} tokens were captured")
                parts.append(np.frombuffer(raw, dtype=np.float32).reshape(len(spans), len(layers), -1))
        self.tally.captures += len(items)
        return np.stack(parts)

    async def _capture_one(
        self,
        ids: list[int],
        spans: Sequence[tuple[int, int]],
        layers: Sequence[int],
        interventions: Sequence[Intervention],
    ) -> str:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        limit = self.llm.model_config.max_model_len
        if len(ids) >= limit:
            raise RefusedError(f"a text has {len(ids)} tokens; this engine holds {limit - 1}")
        spec_id = uuid.uuid4().hex
        what = {"layers": list(layers), "spans": [list(span) for span in spans]}
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            skip_reading_prefix_cache=True,
            extra_args={"steer": spec_of(spec_id, interventions, capture=what)},
        )
        async with self.vectors.hold(interventions), self.rows.hold(len(spans)):
            prompt = TokensPrompt(prompt_token_ids=ids, cache_salt=self.salt(interventions))
            async for _ in self.llm.generate(prompt, params, spec_id):
                pass
        return spec_id
