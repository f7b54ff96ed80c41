"""Engine: stock vLLM that steers per request.

vLLM's async client runs in a thread of its own; the engine core and its worker are processes. The methods here are plain
calls that any number of threads may make at once: their requests share batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from steer.capture import Read, layer_numbers, read_span
from steer.engine.canary import check
from steer.engine.client import SteeringClient
from steer.engine.request import Sampling, per_prompt
from steer.engine.result import Completion
from steer.engine.start import start
from steer.errors import ModelError, RefusedError, SteerError
from steer.fingerprint import Fingerprint, fingerprint
from steer.intervention import Intervention
from steer.pairs import Rendered, chat_ids

T = TypeVar("T")
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
CAPTURED_AT_ONCE = 1024  # prompts whose block outputs are in memory together
WORKER = "steer.engine.worker.SteerWorker"


def _rendered(ids: list[int]) -> Rendered:
    """A prompt without a response."""
    return Rendered(ids, len(ids))


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
        slots: int = 64,
        seed: int = 0,
        canary: bool = True,
        **vllm_options: Any,
    ):
        self.model = str(model)
        found = fingerprint(self.model)  # fails early and clearly on a bad path
        self.weights_path = self.model
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="steer-engine", daemon=True)
        self._thread.start()
        self._closed = False
        self._llm: Any = None
        try:
            steering = {"worker_cls": WORKER, "additional_config": {"steer": {"slots": slots}}}
            options = {"enforce_eager": eager, "seed": seed} | steering | vllm_options
            self._llm = self._call(start(self.model, max_model_len, max_num_batched_tokens, **options))
            self.client = SteeringClient(self._llm, found, slots)
            self._call(self.client.begin())
            if canary:
                self._call(check(self.client))
        except BaseException:
            self.close()
            raise

    # -- plumbing -------------------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's loop and wait for it."""
        if self._closed:
            work.close()
            raise RefusedError("the engine is closed")
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the served weights."""
        return self.client.fingerprint

    @property
    def weight_version(self) -> int:
        """Grows with every change of the served weights."""
        return self.client.weight_version

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.client.layers

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop vLLM's processes and the loop; further calls are refused."""
        if self._closed:
            return
        if self._llm is not None:
            self.loop.call_soon_threadsafe(self._llm.shutdown)
        self._closed = True

        async def drain() -> None:
            others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(drain(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)

    async def check_health(self) -> None:
        """Raise if vLLM's engine has died; on the engine's loop."""
        await self._llm.check_health()

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
        """Refuse what cannot be honoured, see `SteeringClient.check`."""
        self.client.check(interventions)

    async def _run(
        self, ids: list[int], interventions: Sequence[Intervention], settings: Sampling, final_only: bool
    ) -> AsyncIterator[Completion]:
        """A request's completion so far, again and again, or only at the end."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        limit = self._llm.model_config.max_model_len
        if len(ids) >= limit:
            raise RefusedError(f"the prompt has {len(ids)} tokens; this engine holds {limit} with the answer")
        params = SamplingParams(
            max_tokens=min(settings.max_tokens, limit - len(ids)),
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            logprobs=settings.logprobs,
            ignore_eos=settings.ignore_eos,
            output_kind=RequestOutputKind.FINAL_ONLY if final_only else RequestOutputKind.CUMULATIVE,
        )
        prompt = dict(TokensPrompt(prompt_token_ids=ids))
        async for output, receipt in self.client.run(prompt, interventions, params, uuid.uuid4().hex):
            answer = output.outputs[0]
            yield Completion(
                text=answer.text,
                token_ids=list(answer.token_ids),
                prompt_token_ids=list(output.prompt_token_ids),
                receipt=receipt,
                finish_reason=answer.finish_reason,
                logprobs=[{t: lp.logprob for t, lp in position.items()} for position in answer.logprobs or []],
            )

    async def _generate(
        self, ids: list[list[int]], interventions: list[Sequence[Intervention]], settings: list[Sampling]
    ) -> list[Completion]:
        async def last(i: int) -> Completion:
            found = None
            async for completion in self._run(ids[i], interventions[i], settings[i], final_only=True):
                found = completion
            assert found is not None
            return found

        tasks = [asyncio.ensure_future(last(i)) for i in range(len(ids))]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

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
        ignore_eos: bool = False,
    ) -> list[Completion]:
        """One answer to each prompt, all in one batch.

        Args:
            prompts: texts (one user message each), chat messages, or token ids.
            interventions: for all prompts, or a list for each prompt; an empty list is a plain request.
            seed: prompt number i is sampled with `seed + i`; None: not seeded.
            logprobs: how many log-probabilities to return for every token.
            ignore_eos: go on to `max_tokens` whatever is sampled.

        Raises:
            InterventionError: an intervention does not fit this model.
            RefusedError: the engine cannot steer as asked.
        """
        each = per_prompt(interventions, len(prompts))
        for k in each:
            self.check(k)
        settings = [
            Sampling(None if seed is None else seed + i, max_tokens, temperature, top_p, logprobs, ignore_eos)
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
        async for piece in self._run(self.encode(prompt), interventions, Sampling(seed, **sampling), final_only=False):
            yield piece

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

        task = asyncio.run_coroutine_threadsafe(pump(), self.loop)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            task.cancel()

    # -- capture --------------------------------------------------------------------------------------------------

    def captured(
        self,
        prompts: Sequence[Prompt | Rendered],
        layers: Sequence[int] | None = None,
        reads: Sequence[Read] = ("last_prompt",),
        interventions: Sequence[Intervention] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Block outputs at several read positions out of the serving engine itself, part by part; one pass serves them all.

        Args:
            prompts: texts (one user message each), chat messages, token ids, or rendered texts with a response.
            layers: layer numbers; None: all.
            reads: read positions, see `steer.capture.read_span`; at most eight.
            interventions: steer while reading, the whole text being prompt to them; none: the plain model.
            progress: called with (prompts done, prompts in all).

        Yields:
            (indices into `prompts`, values `[reads, layers, part, d_model]` float32), as `steer.capture.captured` does.

        Raises:
            SteerError: a layer the model lacks, or a text without such a position.
            RefusedError: a text longer than the engine holds.
        """
        wanted = layer_numbers(layers, self.layers)
        if not prompts:
            raise SteerError("a capture needs at least one prompt")
        self.check(interventions)
        items = [p if isinstance(p, Rendered) else _rendered(self.encode(p)) for p in prompts]
        spans = [(list(item.ids), [read_span(item, read) for read in reads]) for item in items]
        for first in range(0, len(spans), CAPTURED_AT_ONCE):
            part = spans[first : first + CAPTURED_AT_ONCE]
            found = self._call(self.client.capture(part, wanted, interventions))
            yield list(range(first, first + len(part))), np.ascontiguousarray(found.transpose(1, 2, 0, 3))
            if progress:
                progress(first + len(part), len(spans))

    def capture(
        self,
        prompts: Sequence[Prompt | Rendered],
        layers: Sequence[int] | None = None,
        read: Read = "last_prompt",
        interventions: Sequence[Intervention] = (),
    ) -> dict[int, np.ndarray]:
        """Block outputs at one read position, averaged over its span; arguments and errors as of `captured`.

        Returns:
            layer → `[len(prompts), d_model]` float32, as `steer.capture.capture` gives on a Hugging Face model.
        """
        wanted = layer_numbers(layers, self.layers)
        parts = [values[0] for _, values in self.captured(prompts, wanted, (read,), interventions)]
        return dict(zip(wanted, np.concatenate(parts, axis=1), strict=True)) if parts else {}

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
                await self.client.rpc("reload_weights", weights_path=str(path))
                self.client.weight_version += 1
                await self._llm.reset_prefix_cache(reset_running_requests=True)
            finally:
                await self._llm.resume_generation()

        self._call(swap())
        self.weights_path = str(path)
        self.client.fingerprint = new
        self.client.lineage.add(new.weights)
        return self.weight_version
