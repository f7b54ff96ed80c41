"""The worker: vLLM's own, with taps in the model and a router in front of each forward pass.

vLLM makes the worker from the name in `worker_cls` and calls the `steer_…` methods through `collective_rpc`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.platforms import current_platform

from steer.engine.refusal import refusal
from steer.engine.router import Router
from steer.engine.runners import attach
from steer.engine.slots import pool_rows
from steer.engine.taps import Steering, install

if TYPE_CHECKING or current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

SLOTS = 64
TAPS = 2  # version of the taps' graph
ROWS_OF_PADDING = 512  # graphs pad batches up to a capture size


class SteerWorker(PlatformWorker):
    """The platform's worker, steerable."""

    model_runner: Any
    vllm_config: Any
    device: torch.device

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, put the taps in before it is compiled, connect the router.

        Raises:
            RuntimeError: a configuration whose rows cannot be told apart, or a model whose layers are not found.
        """
        options = {"slots": SLOTS, "taps": TAPS} | (self.vllm_config.additional_config or {}).get("steer", {})
        # enters vLLM's compile-cache key, which the worker's class does not: a graph compiled without taps is never taken
        self.vllm_config.additional_config = {**(self.vllm_config.additional_config or {}), "steer": options}
        super().load_model(*args, **kwargs)
        if (reason := refusal(self.vllm_config)) is not None:
            raise RuntimeError(f"steering is refused with {reason}")
        scheduler, text = self.vllm_config.scheduler_config, self.vllm_config.model_config.hf_text_config
        self._steering = Steering(
            text.num_hidden_layers,
            text.hidden_size,
            scheduler.max_num_batched_tokens + ROWS_OF_PADDING,
            int(options["slots"]),
            pool_rows(scheduler.max_num_seqs),
            self.device,
        )
        install(self.model_runner.get_model(), self._steering, text.num_hidden_layers)
        self._router = Router(self._steering)
        attach(self.model_runner, self._router, bool(getattr(self.vllm_config, "use_v2_model_runner", False)))

    def steer_register(
        self, key: str, slot: int, layers: Sequence[int], separations: Sequence[float], directions: Sequence[bytes]
    ) -> int:
        """Write a vector (float32 bytes of `[d_model]` for each layer) into a slot of the table; returns layers written."""
        unit = [torch.from_numpy(np.frombuffer(raw, dtype=np.float32).copy()) for raw in directions]
        table = {n: (float(s), d) for n, s, d in zip(layers, separations, unit, strict=True)}
        self._router.register(key, slot, table)
        return len(table)

    def steer_counts(self, ids: Sequence[str]) -> list[int]:
        """Tokens steered for each request."""
        return self._router.counts(ids)

    def steer_captures(self, ids: Sequence[str]) -> list[tuple[bytes, int]]:
        """Captured block outputs of each request, see `Router.captures`."""
        return self._router.captures(ids)

    def steer_layers(self) -> int:
        """Number of tapped decoder layers."""
        return len(self._steering.directions)
