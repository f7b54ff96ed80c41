"""Engine: stock vLLM that steers per request.

vLLM's async client runs in a thread of its own; the engine core and its worker are processes. The methods here are plain
calls that any number of threads may make at once: their requests share batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from steer.engine.request import Progress, Sampling, per_prompt
from steer.engine.result import Completion, Receipt
from steer.engine.slots import VectorSlots, key_of
from steer.errors import InterventionError, ModelError, RefusedError
from steer.fingerprint import Fingerprint, fingerprint
from steer.intervention import Intervention, hash_of
from steer.pairs import chat_ids

T = TypeVar("T")
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


def _environment() -> None:
    """vLLM settings that must stand before its import; what the user has set stays."""
    for name, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)


class Engine:
    """A served model.

    Args:
        model: folder or hub id.
        eager: run without compiling: starts sooner, generates more slowly.
        max_model_len: longest prompt plus answer, in tokens; None: 4,096 or the model's own limit if smaller.
        slots: vectors the workers' tables hold at once.
        seed: of vLLM's own random state.
        canary: prove at start, through the real graph, that strength 0 changes nothing and a strength does.

    Raises:
        ModelError: no such model, or one vLLM cannot load or whose layers cannot be tapped.
        RefusedError: the canary failed.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        eager: bool = False,
        max_model_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        slots: int = 32,
        seed: int = 0,
        canary: bool = True,
        **vllm_options: Any,
    ):
        self.model = str(model)
        self.fingerprint: Fingerprint = fingerprint(self.model)  # fails early and clearly on a bad path
        self.weights_path = self.model
        self.weight_version = 0
        self._lineage = {self.fingerprint.weights}
        self._vectors = VectorSlots(slots, self._rpc)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="steer-engine", daemon=True)
        self._thread.start()
        self._closed = False
        self._llm: Any = None
        try:
            self._llm = self._call(self._start(eager, max_model_len, max_num_batched_tokens, slots, seed, vllm_options))
            self.layers: int = self._call(self._rpc("steer_layers"))[0]
            if canary:
                from steer.engine.canary import check

                check(self)
        except BaseException:
            self.close()
            raise

    async def _start(
        self, eager: bool, length: int | None, batched: int | None, slots: int, seed: int, options: dict[str, Any]
    ) -> Any:
        _environment()
        import torch
        from transformers import AutoConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        config = AutoConfig.from_pretrained(self.model).get_text_config()
        limit = int(getattr(config, "max_position_embeddings", 4096))
        on_gpu = torch.cuda.is_available()
        arguments: dict[str, Any] = {
            "model": self.model,
            "dtype": "bfloat16",
            "enforce_eager": eager,
            "max_model_len": min(length or 4096, limit),
            "max_num_batched_tokens": batched or 4096,
            "seed": seed,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "worker_cls": f"steer.engine.worker.{'GPU' if on_gpu else 'CPU'}SteerWorker",
            # enters vLLM's compile-cache key, so that a graph compiled without taps is never taken
            "additional_config": {"steer": {"slots": slots, "taps": 1}},
        }
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**(arguments | options)))
        except Exception as error:
            raise ModelError(f"{self.model}: vLLM could not load it: {str(error).splitlines()[0]}") from error

    # -- plumbing -------------------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's loop and wait for it."""
        if self._closed:
            work.close()
            raise RefusedError("the engine is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return await self._llm.collective_rpc(method, args=args, kwargs=kwargs)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop vLLM's processes and the loop; further calls are refused."""
        if self._closed:
            return
        if self._llm is not None:
            self._loop.call_soon_threadsafe(self._llm.shutdown)
        self._closed = True

        async def drain() -> None:
            others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(drain(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    # -- generation -----------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self._llm.get_tokenizer()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a text is one user message, messages go through the chat template, ids stay."""
        if not prompt:
            raise RefusedError("the prompt is empty")
        if isinstance(prompt, str):
            if not getattr(self.tokenizer, "chat_template", None):
                return list(self.tokenizer(prompt)["input_ids"])
            return chat_ids(self.tokenizer, [{"role": "user", "content": prompt}])
        if isinstance(prompt[0], int):
            return [int(t) for t in prompt]  # type: ignore[arg-type]
        return chat_ids(self.tokenizer, prompt)  # type: ignore[arg-type]

    def check(self, interventions: Sequence[Intervention]) -> None:
        """Refuse what cannot be honoured: another width, model or layer."""
        for i in interventions:
            v = i.vector
            if v.width != self.fingerprint.width:
                raise InterventionError(f'vector "{v.name}" has width {v.width}, the model {self.fingerprint.width}')
            missing = [layer for layer in i.at if not 0 <= layer < self.layers]
            if missing:
                raise InterventionError(
                    f"layer {missing[0]} does not exist: the model has layers 0 to {self.layers - 1}"
                )
            differs = v.fingerprint.differences(self.fingerprint)
            if v.fingerprint.weights in self._lineage:
                differs = [d for d in differs if not d.startswith("weights ")]
            if differs and not v.mismatch_allowed:
                raise InterventionError(f'vector "{v.name}" was made on another model: {"; ".join(differs)}')

    def salt(self, interventions: Sequence[Intervention]) -> str:
        """Prefix-cache salt: requests share blocks only under the same interventions, vectors and weights."""
        return f"w{self.weight_version}:{hash_of(interventions) if interventions else 'plain'}"

    async def _run(
        self, ids: list[int], interventions: Sequence[Intervention], settings: Sampling, final_only: bool
    ) -> AsyncIterator[Progress]:
        """vLLM's outputs for one request, with what the receipt needs; the vectors are held while it runs."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        limit = self._llm.model_config.max_model_len
        if len(ids) >= limit:
            raise RefusedError(f"the prompt has {len(ids)} tokens; this engine holds {limit} with the answer")
        request_id = uuid.uuid4().hex
        terms = [{"key": key_of(i), "strength": float(i.strength), "tokens": i.tokens} for i in interventions]
        params = SamplingParams(
            max_tokens=min(settings.max_tokens, limit - len(ids)),
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            logprobs=settings.logprobs,
            output_kind=RequestOutputKind.FINAL_ONLY if final_only else RequestOutputKind.CUMULATIVE,
            extra_args={"steer": json.dumps({"id": request_id, "terms": terms})} if terms else None,
        )
        async with self._vectors.hold(interventions):
            version, salt = self.weight_version, self.salt(interventions)
            prompt = TokensPrompt(prompt_token_ids=ids, cache_salt=salt)
            async for output in self._llm.generate(prompt, params, request_id):
                yield Progress(request_id, output, version)

    async def _counts(self, ids: Sequence[str]) -> list[int]:
        """Tokens steered, for each request; the least over the workers."""
        return [min(per_worker) for per_worker in zip(*await self._rpc("steer_counts", list(ids)), strict=True)]

    def _completion(self, progress: Progress, interventions: Sequence[Intervention], steered: int | None) -> Completion:
        """The completion and its receipt; `steered` is None while the answer is still being made.

        Raises:
            RefusedError: the worker steered fewer tokens than the interventions cover.
        """
        output = progress.output
        answer = output.outputs[0]
        prompt, made, cached = len(output.prompt_token_ids), len(answer.token_ids), output.num_cached_tokens or 0
        if steered is not None and interventions:
            scopes = {i.tokens for i in interventions}
            due = (prompt - cached if scopes & {"all", "prompt"} else 0) + (
                made - 1 if scopes & {"all", "generated"} else 0
            )
            if steered < due:
                raise RefusedError(f"only {steered} of {due} tokens were steered, so the answer is withheld")
        receipt = Receipt(
            interventions=tuple(i.record() for i in interventions),
            intervention_hash=hash_of(interventions) if interventions else "",
            weight_version=progress.version,
            weights_changed=progress.version != self.weight_version,
            tokens_steered=steered or 0,
            tokens_cached=cached,
        )
        logprobs = [{t: lp.logprob for t, lp in position.items()} for position in answer.logprobs or []]
        return Completion(
            text=answer.text,
            token_ids=list(answer.token_ids),
            prompt_token_ids=list(output.prompt_token_ids),
            receipt=receipt,
            finish_reason=answer.finish_reason,
            logprobs=logprobs,
        )

    async def _generate(
        self, ids: list[list[int]], interventions: list[Sequence[Intervention]], settings: list[Sampling]
    ) -> list[Completion]:
        async def last(i: int) -> Progress:
            found = None
            async for progress in self._run(ids[i], interventions[i], settings[i], final_only=True):
                found = progress
            assert found is not None
            return found

        tasks = [asyncio.ensure_future(last(i)) for i in range(len(ids))]
        try:
            done = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        counts = await self._counts([p.id for p in done]) if any(interventions) else [0] * len(done)
        return [self._completion(p, k, n) for p, k, n in zip(done, interventions, counts, strict=True)]

    def generate(
        self,
        prompts: Sequence[Prompt],
        interventions: Sequence[Intervention] | Sequence[Sequence[Intervention]] = (),
        *,
        seed: int | None = 0,
        max_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        logprobs: int | None = None,
    ) -> list[Completion]:
        """One answer to each prompt, all in one batch.

        Args:
            prompts: texts (one user message each), chat messages, or token ids.
            interventions: for all prompts, or a list for each prompt; an empty list is a plain request.
            seed: prompt number i is sampled with `seed + i`; None: not seeded.
            logprobs: how many log-probabilities to return for every token.

        Raises:
            InterventionError: an intervention does not fit this model.
            RefusedError: the engine cannot steer as asked.
        """
        each = per_prompt(interventions, len(prompts))
        for k in each:
            self.check(k)
        settings = [
            Sampling(None if seed is None else seed + i, max_tokens, temperature, top_p, logprobs)
            for i in range(len(prompts))
        ]
        return self._call(self._generate([self.encode(p) for p in prompts], each, settings))

    def compare(
        self, prompts: Sequence[Prompt], interventions: Sequence[Intervention], *, seed: int = 0, **sampling: Any
    ) -> tuple[list[Completion], list[Completion]]:
        """(plain, steered) answers to the same prompts from the same seeds, in one batch."""
        n = len(prompts)
        self.check(interventions)
        settings = [Sampling(seed + i, **sampling) for i in range(n)] * 2
        ids = [self.encode(p) for p in prompts] * 2
        both = self._call(self._generate(ids, [()] * n + [interventions] * n, settings))
        return both[:n], both[n:]

    async def astream(
        self, prompt: Prompt, interventions: Sequence[Intervention] = (), *, seed: int | None = 0, **sampling: Any
    ) -> AsyncIterator[Completion]:
        """The answer so far, again and again, on the engine's own loop. The last item has a `finish_reason` and the full receipt."""
        self.check(interventions)
        async for progress in self._run(
            self.encode(prompt), interventions, Sampling(seed, **sampling), final_only=False
        ):
            steered = None
            if progress.output.finished:
                steered = (await self._counts([progress.id]))[0] if interventions else 0
            yield self._completion(progress, interventions, steered)

    def stream(
        self, prompt: Prompt, interventions: Sequence[Intervention] = (), *, seed: int | None = 0, **sampling: Any
    ) -> Iterator[Completion]:
        """`astream` for ordinary code; closing the iterator aborts the request."""
        if self._closed:
            raise RefusedError("the engine is closed")
        pieces: queue.SimpleQueue[Completion | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for piece in self.astream(prompt, interventions, seed=seed, **sampling):
                    pieces.put(piece)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)
                raise

        task = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            task.cancel()

    # -- weights --------------------------------------------------------------------------------------------------

    def update_weights(self, path: str | Path) -> int:
        """Swap the served weights for those in a model folder, and return the new weight version.

        Running requests are held, the weights are loaded in place, the prefix cache is dropped, the version rises, and
        the requests go on; their receipts say that the weights changed.

        Raises:
            ModelError: the folder is missing or holds another architecture; nothing has changed then.
        """
        new = fingerprint(str(path))
        for name in ("architecture", "config", "tokenizer"):
            if getattr(new, name) != getattr(self.fingerprint, name):
                raise ModelError(f"{path}: its {name} differs from the served model's, so it cannot be swapped in")

        async def swap() -> None:
            await self._llm.pause_generation(mode="keep", clear_cache=False)
            try:
                await self._rpc("reload_weights", weights_path=str(path))
                self.weight_version += 1
                await self._llm.reset_prefix_cache(reset_running_requests=True)
            finally:
                await self._llm.resume_generation()

        self._call(swap())
        self.weights_path = str(path)
        self.fingerprint = new
        self._lineage.add(new.weights)
        return self.weight_version
