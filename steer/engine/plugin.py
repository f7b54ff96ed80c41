"""vLLM's general plugin. vLLM loads it in every process it starts.

It does four things; none of them changes what a vLLM that is not asked to steer does:

- where torchvision is missing, transformers' Pillow image processor stands in, so that Qwen3.5 loads: vLLM's `qwen3_5` module
  imports `image_processing_qwen2_vl`, which needs torchvision; the CPU environment has none, and text serving runs neither;
- on CPUs without bfloat16 instructions linear layers multiply in float32, see `steer.engine.cpu`;
- a request to vLLM's async engine whose extra arguments carry `steering` (in `vllm serve`: `vllm_xargs`) is steered by a `SteeringClient`;
- a request that asks for steering and would not get it is refused.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import multiprocessing
import sys
from collections.abc import AsyncIterator
from typing import Any

from steer.engine.cpu import multiply_in_float32

_NEEDS_TORCHVISION = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
_PILLOW = "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"


def register() -> None:
    """Entry point."""
    _stand_in_for_torchvision()
    multiply_in_float32()
    process = multiprocessing.current_process().name
    if process == "MainProcess" or process.startswith("ApiServer"):  # where requests come in
        _steer_requests()


def _stand_in_for_torchvision() -> None:
    """Put the Pillow image processor where the torchvision one is asked for; nothing where torchvision is installed."""
    if importlib.util.find_spec("torchvision") is None and _NEEDS_TORCHVISION not in sys.modules:
        module = importlib.import_module(_PILLOW)
        for name in list(vars(module)):
            if "Pil" in name:
                vars(module).setdefault(name.replace("Pil", ""), getattr(module, name))
        sys.modules[_NEEDS_TORCHVISION] = module


def _steer_requests() -> None:
    """Wrap the two doors a request comes in by: the async engine's `generate`, and the processing of every input."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    if hasattr(AsyncLLM.generate, "steer"):
        return
    generate, process = AsyncLLM.generate, InputProcessor.process_inputs

    @functools.wraps(generate)
    async def steered(
        self: Any, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncIterator[Any]:
        from steer.engine.inbound import asked, run

        steering = asked(sampling_params)
        if steering is None:
            async for output in generate(self, prompt, sampling_params, request_id, **options):
                yield output
        else:
            async for output in run(self, steering, prompt, sampling_params, request_id, **options):
                yield output

    @functools.wraps(process)
    def processed(self: Any, *args: Any, **kwargs: Any) -> Any:
        from steer.engine.inbound import check_resolved, plain_text

        for value in (*args, *kwargs.values()):
            check_resolved(getattr(value, "extra_args", None))
        return plain_text(process(self, *args, **kwargs))

    steered.steer = True  # type: ignore[attr-defined]
    AsyncLLM.generate, InputProcessor.process_inputs = steered, processed  # type: ignore[method-assign, assignment]
