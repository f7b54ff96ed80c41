"""The worker: taps in the model, coefficients for each step, and the count of what was really steered.

vLLM makes the worker from the name in `worker_cls` and calls these methods through `collective_rpc`. A request carries its
steering as JSON text in `SamplingParams.extra_args["steer"]`:

    {"id": "…", "terms": [{"key": "…", "strength": 1.5, "tokens": "all"}, …]}
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from steer.engine.taps import Tap, install

RECEIPTS_KEPT = 16384


@dataclass
class Spec:
    """A request's steering as the worker uses it."""

    id: str
    terms: list[tuple[str, float, str]]  # key, strength, scope


def scope_span(scope: str, prompt: int, start: int, end: int) -> tuple[int, int]:
    """The part of positions [start, end) that a scope covers, for a prompt of `prompt` tokens; empty if lo >= hi."""
    if scope == "prompt":
        return start, min(end, prompt)
    if scope == "generated":
        return max(start, prompt), end
    return start, end


class Router:
    """Writes each step's coefficients from the requests in the batch, and counts the tokens it steers."""

    def __init__(self, runner: Any, taps: list[Tap]):
        self.runner = runner
        self.taps = taps
        self.slots: dict[str, int] = {}
        self.specs: dict[str, Spec | None] = {}
        self.steered: OrderedDict[str, int] = OrderedDict()
        self.dirty = 0  # rows of the coefficients that may be non-zero
        max_tokens, slots = taps[0].coefficients.shape
        self.staging = torch.zeros(max_tokens, slots, pin_memory=taps[0].coefficients.is_cuda)
        self.rows: np.ndarray = self.staging.numpy()

    def spec_of(self, request_id: str) -> Spec | None:
        if request_id not in self.specs:
            params = self.runner.requests[request_id].sampling_params
            raw = (params.extra_args or {}).get("steer") if params is not None else None
            parsed = json.loads(raw) if raw else None
            terms = [(t["key"], float(t["strength"]), t["tokens"]) for t in parsed["terms"]] if parsed else []
            self.specs[request_id] = Spec(parsed["id"], terms) if parsed else None
        return self.specs[request_id]

    def before_forward(self) -> None:
        """Fill the coefficients for the tokens about to run."""
        batch = self.runner.input_batch
        starts = self.runner.query_start_loc.np
        clean = self.dirty
        if clean:
            self.rows[:clean] = 0.0
        self.dirty = 0
        if len(self.specs) > 4 * max(64, len(self.runner.requests)):
            self.specs = {k: v for k, v in self.specs.items() if k in self.runner.requests}
        for i, request_id in enumerate(batch.req_ids):
            spec = self.spec_of(request_id)
            if spec is None:
                continue
            first, last = int(starts[i]), int(starts[i + 1])
            computed = int(batch.num_computed_tokens_cpu[i])
            prompt = int(batch.num_prompt_tokens[i])
            touched = np.zeros(last - first, dtype=bool)
            for key, strength, scope in spec.terms:
                low, high = scope_span(scope, prompt, computed, computed + last - first)
                slot = self.slots.get(key)
                if slot is None or low >= high:
                    continue  # an unknown key leaves the count short, and the engine refuses the answer
                self.rows[first + low - computed : first + high - computed, slot] += strength
                touched[low - computed : high - computed] = True
            self.dirty = max(self.dirty, last)
            self.steered[spec.id] = self.steered.get(spec.id, 0) + int(touched.sum())
            while len(self.steered) > RECEIPTS_KEPT:
                self.steered.popitem(last=False)
        changed = max(clean, self.dirty)
        if changed:
            self.taps[0].coefficients[:changed].copy_(self.staging[:changed], non_blocking=True)


class SteerWorkerMixin:
    """Adds taps and routing to a vLLM worker."""

    model_runner: Any
    vllm_config: Any
    device: torch.device

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        options = (self.vllm_config.additional_config or {}).get("steer", {})
        runner, parallel = self.model_runner, self.vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise RuntimeError("steering with pipeline parallelism is not supported")
        if getattr(self.vllm_config, "use_v2_model_runner", False):
            raise RuntimeError("steering needs the V1 model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
        text = self.vllm_config.model_config.hf_text_config
        self._taps = install(
            runner.get_model(),
            text.num_hidden_layers,
            text.hidden_size,
            runner.max_num_tokens + 512,  # graphs pad batches up to a capture size
            int(options.get("slots", 32)),
            self.device,
        )
        self._router = Router(runner, self._taps)
        forward = runner._model_forward

        def model_forward(*args: Any, **kwargs: Any) -> Any:
            self._router.before_forward()
            return forward(*args, **kwargs)

        runner._model_forward = model_forward

    def steer_register(self, key: str, slot: int, layers: Sequence[int], shifts: Sequence[bytes]) -> int:
        """Write a vector's shifts (float32 bytes, one per layer; zero elsewhere) into a slot; returns layers written."""
        table = {layer: np.frombuffer(raw, dtype=np.float32).copy() for layer, raw in zip(layers, shifts, strict=True)}
        for old in [k for k, s in self._router.slots.items() if s == slot]:
            del self._router.slots[old]
        for number, tap in enumerate(self._taps):
            tap.table[slot].zero_()
            if number in table:
                tap.table[slot].copy_(torch.from_numpy(table[number]))
        self._router.slots[key] = slot
        return len(table)

    def steer_counts(self, ids: Sequence[str]) -> list[int]:
        """Tokens steered for each request id; the counts are handed over and forgotten."""
        return [self._router.steered.pop(i, 0) for i in ids]

    def steer_layers(self) -> int:
        """Number of tapped decoder layers."""
        return len(self._taps)


class CPUSteerWorker(SteerWorkerMixin, CPUWorker):
    """The CPU worker, steerable."""


class GPUSteerWorker(SteerWorkerMixin, GPUWorker):
    """The CUDA worker, steerable."""
