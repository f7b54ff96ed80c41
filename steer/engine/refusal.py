"""Configurations of vLLM that cannot be steered, and why."""

from __future__ import annotations

from typing import Any


def refusal(config: Any) -> str | None:
    """Why a model served with this `VllmConfig` cannot be steered: None where it can."""
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism: no worker has all layers; use tensor parallelism"
    if getattr(parallel, "use_ubatching", False):
        return "micro-batching (dbo) runs parts of a step by themselves, so that rows no longer tell the request"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "prefill context parallelism shards rows by token"
    passes = getattr(config.compilation_config, "pass_config", None)
    if getattr(passes, "enable_sp", False):
        return "sequence parallelism shards rows by token"
    return None
