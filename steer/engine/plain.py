"""vLLM without us: its own worker, no taps, the same start-up settings. What steering is measured against."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer.engine.start import start


class PlainVllm:
    """A served model that cannot be steered; a context manager."""

    def __init__(
        self,
        model: str | Path,
        max_model_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        **options: Any,
    ):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="plain-vllm", daemon=True)
        self._thread.start()
        self._llm = self._call(start(str(model), max_model_len, max_num_batched_tokens, **options))

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __enter__(self) -> PlainVllm:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._llm.shutdown)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def generate(self, prompts: Sequence[list[int]], **sampling: Any) -> list[Any]:
        """vLLM's final output of each prompt, all in one batch; `sampling` is vLLM's SamplingParams."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        async def one(ids: list[int]) -> Any:
            params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
            found = None
            async for output in self._llm.generate(TokensPrompt(prompt_token_ids=ids), params, uuid.uuid4().hex):
                found = output
            return found

        async def everything() -> list[Any]:
            return await asyncio.gather(*(one(ids) for ids in prompts))

        return self._call(everything())
