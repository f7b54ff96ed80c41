"""Steering that comes in with a request to vLLM itself: `vllm serve MODEL --worker-cls steer.engine.worker.SteerWorker`.

The request's extra arguments (over HTTP: `vllm_xargs`, which holds no nested values, hence JSON text) name vectors of the folder in
the environment variable `STEER_VECTORS`:

    {"vllm_xargs": {"steering": "[{\\"vector\\": \\"accept\\", \\"strength\\": 0.7}]"}}

The receipt comes back in `kv_transfer_params["steering"]`, the one field of vLLM's responses that is passed through.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMValidationError

from steer.engine.canary import check
from steer.engine.client import Resolved, SteeringClient
from steer.engine.worker import SLOTS
from steer.errors import InterventionError, SteerError
from steer.fingerprint import fingerprint
from steer.vector import SteeringVector

FOLDER = "STEER_VECTORS"


def refuse(message: str, field: str = "steering") -> VLLMValidationError:
    """What vLLM's server answers with 400 and the field's name."""
    return VLLMValidationError(message, parameter=field)


def asked(params: Any) -> Any:
    """The steering that a request's extra arguments ask for, taken out of them; None for none."""
    extra = getattr(params, "extra_args", None) or {}
    if "steering" not in extra:
        return None
    steering = extra["steering"]
    params.extra_args = {k: v for k, v in extra.items() if k != "steering"} or None
    return steering


def check_resolved(extra: dict[str, Any] | None) -> None:
    """Refuse extra arguments that ask for steering and did not come through a `SteeringClient`.

    Raises:
        VLLMValidationError: the request would be answered unsteered, or speaks to the workers behind the client's back.
    """
    if not extra:
        return
    if "steering" in extra:
        raise refuse("steering needs vLLM's async engine (vllm serve) or steer.Engine: this door would leave it out")
    if "steer" in extra and not isinstance(extra["steer"], Resolved):
        raise refuse('the extra argument "steer" is reserved: ask with "steering"', "steer")


def plain_text(request: Any) -> Any:
    """The processed request with its spec as ordinary text, which is what travels to the engine core."""
    extra = getattr(request.sampling_params, "extra_args", None)
    if extra and "steer" in extra:
        request.sampling_params.extra_args = {**extra, "steer": str.__str__(extra["steer"])}
    return request


def from_folder(name: Any) -> SteeringVector:
    """A vector of the folder in `STEER_VECTORS`, by the name of its file without the ending."""
    folder = os.environ.get(FOLDER)
    if not folder:
        raise InterventionError(f"no vectors are served: start with {FOLDER}=FOLDER", "vector")
    if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
        raise InterventionError(f"a vector is named by its file in {FOLDER}, without the ending", "vector")
    path = Path(folder) / f"{name}.safetensors"
    if not path.is_file():
        raise InterventionError(f'there is no vector "{name}"', "vector")
    return SteeringVector.load(path)


_clients_lock = asyncio.Lock()


async def client_of(llm: Any) -> SteeringClient:
    """The steering client of an engine; made on the first steered request where vLLM's own server made the engine."""
    async with _clients_lock:
        if not hasattr(llm, "steering_client"):
            config = llm.vllm_config
            options = (config.additional_config or {}).get("steer", {})
            client = SteeringClient(llm, fingerprint(config.model_config.model), int(options.get("slots", SLOTS)))
            await client.begin()
            await check(client)
            llm.steering_client = client
    return llm.steering_client


async def run(llm: Any, steering: Any, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
    """vLLM's outputs for a request with steering.

    Raises:
        VLLMValidationError: the steering is malformed, does not fit the model, or cannot be done now.
    """
    try:
        client = await client_of(llm)
        interventions = client.parse(steering, from_folder)
        if not isinstance(prompt, dict) or "prompt_token_ids" not in prompt:
            raise InterventionError("steering needs a prompt of text or tokens", "prompt")
        async for output, receipt in client.run(dict(prompt), interventions, params, request_id, **options):
            if output.finished:
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), "steering": asdict(receipt)}
            yield output
    except SteerError as error:
        raise refuse(str(error), getattr(error, "field", "") or "steering") from None
