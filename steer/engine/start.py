"""Starting vLLM's async engine: the settings that must stand before its import, and what its processes may see."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from steer.errors import ModelError, RefusedError


def environment() -> None:
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


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """vLLM spawns its processes, and a spawned Python runs the main script again: a script without a `__main__` guard
    would start an engine in the engine. vLLM needs nothing of that script, so it is kept from seeing it."""
    main = sys.modules["__main__"]
    kept = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    vars(main).pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(kept)


async def start(model: str, max_model_len: int | None, max_num_batched_tokens: int | None, **options: Any) -> Any:
    """A vLLM `AsyncLLM` with our defaults, on the running loop.

    Args:
        max_model_len: longest prompt plus answer, in tokens; None: 4,096 or the model's own limit if smaller.
        max_num_batched_tokens: in one step; None: 4,096.
        options: vLLM's engine arguments; they win over the defaults.

    Raises:
        ModelError: vLLM cannot load the model.
        RefusedError: it can, but not so that it could be steered.
    """
    environment()
    from transformers import AutoConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from steer.engine.refusal import refusal

    config = AutoConfig.from_pretrained(model).get_text_config()
    limit = int(getattr(config, "max_position_embeddings", 4096))
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16",
        "max_model_len": min(max_model_len or 4096, limit),
        "max_num_batched_tokens": max_num_batched_tokens or 4096,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    try:
        with without_main():
            engine_args = AsyncEngineArgs(**(arguments | options))
            vllm_config = engine_args.create_engine_config()
            if "worker_cls" in options and (reason := refusal(vllm_config)):
                raise RefusedError(f"{model}: steering is refused with {reason}")
            return AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=engine_args.disable_log_stats)
    except RefusedError:
        raise
    except Exception as error:
        raise ModelError(f"{model}: vLLM could not load it: {str(error).strip().splitlines()[0]}") from error
