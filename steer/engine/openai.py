"""vLLM's own OpenAI-compatible handlers, behind a door through which every request goes to the steering client.

Only what answers a request is taken from vLLM; its routes that change or show state (LoRA loading, weight updates, sleep, profiling,
cache resets, tokenizer and server information) are not. All methods run on the engine's loop.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

from steer.engine.client import SteeringClient
from steer.engine.result import Receipt
from steer.errors import InterventionError, RefusedError, SteerError
from steer.intervention import Intervention, Resolve

log = logging.getLogger(__name__)
DONE = "data: [DONE]"


@dataclass
class HttpError(Exception):
    """An answer that is an error: HTTP status, message, the field at fault."""

    status: int
    message: str
    param: str | None = None

    def content(self) -> dict[str, Any]:
        """The body, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


@dataclass
class _Request:
    """What the door knows of the HTTP request under way."""

    interventions: list[Intervention]
    receipts: list[Receipt] = field(default_factory=list)
    failure: SteerError | None = None


_request: ContextVar[_Request] = ContextVar("request")


class _Door:
    """The engine as vLLM's handlers see it: everything is vLLM's but `generate`, which steers."""

    def __init__(self, client: SteeringClient):
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client.llm, name)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        # the request is looked up now, in the task that handles it: a stream is read by another
        run = self._client.run(dict(prompt), _request.get().interventions, sampling_params, request_id, **options)
        return self._run(_request.get(), run)

    async def _run(self, request: _Request, run: AsyncIterator[tuple[Any, Receipt]]) -> AsyncIterator[Any]:
        try:
            async for output, receipt in run:
                if output.finished:
                    request.receipts.append(receipt)
                yield output
        except SteerError as error:
            request.failure = error
            raise


class OpenAIServing:
    """Completions and chat completions with steering, in OpenAI's protocol.

    Args:
        client: of the engine.
        name: of the model, as requests give it.
        resolve: finds the vector a request names.
    """

    def __init__(self, client: SteeringClient, name: str, resolve: Resolve):
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
        from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
        from vllm.entrypoints.openai.models.protocol import BaseModelPath
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels
        from vllm.renderers.online_renderer import OnlineRenderer

        self.client, self.resolve, self.name = client, resolve, name
        door: Any = _Door(client)
        self._models = OpenAIServingModels(door, [BaseModelPath(name=name, model_path=client.llm.model_config.model)])
        template: dict[str, Any] = {"chat_template": None, "chat_template_content_format": "auto"}
        renderer = OnlineRenderer(door.model_config, door.renderer, request_logger=None, **template)
        common: dict[str, Any] = {
            "online_renderer": renderer,
            "request_logger": None,
            "enable_prompt_tokens_details": True,
        }
        self._completion = OpenAIServingCompletion(door, self._models, **common)
        self._chat = OpenAIServingChat(door, self._models, "assistant", **common, **template)

    async def models(self) -> dict[str, Any]:
        """The body of `/v1/models`."""
        return (await self._models.show_available_models()).model_dump()

    async def completions(self, body: Any) -> dict[str, Any] | AsyncIterator[str]:
        """Answer `/v1/completions`: a body, or the events of a stream."""
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        return await self._answer(body, CompletionRequest, self._completion.create_completion)

    async def chat(self, body: Any) -> dict[str, Any] | AsyncIterator[str]:
        """Answer `/v1/chat/completions`: a body, or the events of a stream."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        return await self._answer(body, ChatCompletionRequest, self._chat.create_chat_completion)

    def _steering(self, body: dict[str, Any]) -> list[Intervention]:
        """The interventions a body asks for, taken out of it.

        Raises:
            InterventionError: with the field at fault.
        """
        given, xargs = body.pop("steering", None), body.get("vllm_xargs")
        if isinstance(xargs, dict) and "steering" in xargs:
            if given is not None:
                raise InterventionError("steering is given twice, in the body and in vllm_xargs", "vllm_xargs.steering")
            given = xargs["steering"]
            body["vllm_xargs"] = {k: v for k, v in xargs.items() if k != "steering"} or None
        if given is None:
            return []
        interventions = self.client.parse(given, self.resolve)
        if interventions and body.get("use_beam_search"):
            raise InterventionError(
                "beam search makes answer tokens part of the prompt, so it cannot be steered", "use_beam_search"
            )
        return interventions

    async def _answer(self, body: Any, form: Any, create: Any) -> dict[str, Any] | AsyncIterator[str]:
        from pydantic import ValidationError
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.exceptions import VLLMClientError

        if not isinstance(body, Mapping):
            raise HttpError(400, "the body is a JSON object")
        body = dict(body)
        try:
            asked = _Request(self._steering(body))
            request = form(**body)
        except InterventionError as error:
            self.client.tally.refused += 1
            raise HttpError(400, str(error), error.field) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"]) or None
            raise HttpError(400, f"{where}: {first['msg']}" if where else str(first["msg"]), where) from None
        except (VLLMClientError, ValueError) as error:
            raise _http(error) from None
        except (TypeError, AttributeError, KeyError) as error:  # vLLM's own validators trip over values of another kind
            raise _malformed(body, error) from None
        _request.set(asked)
        try:
            found = await create(request)
        except Exception as error:
            if asked.failure is not None:
                raise _http(asked.failure) from None
            if isinstance(error, VLLMClientError | ValueError | TypeError | OverflowError):  # vLLM's way to say 400
                raise _http(error) from None
            log.exception("a request failed")
            raise HttpError(500, f"{type(error).__name__}: the request failed") from error
        if isinstance(found, ErrorResponse):
            if asked.failure is not None:
                raise _http(asked.failure)
            raise HttpError(int(found.error.code), found.error.message, found.error.param)
        if hasattr(found, "model_dump"):
            return found.model_dump() | {"steering": [asdict(r) for r in asked.receipts]}
        return _with_receipts(found, asked)


def _malformed(body: dict[str, Any], error: Exception) -> HttpError:
    """A body that vLLM's own validators could not even read: the field is the first that is not of its kind."""
    kinds = {
        "messages": list,
        "prompt": (str, list),
        "model": str,
        "stop": (str, list),
        "tools": list,
        "stream_options": dict,
    }
    for name, kind in kinds.items():
        if body.get(name) is not None and not isinstance(body[name], kind):
            return HttpError(400, f"{name} is not of its kind: {type(body[name]).__name__}", name)
    return HttpError(400, f"the request is malformed: {error}")


def _http(error: Exception) -> HttpError:
    """The answer to an error: what the request did wrong is 400, what the engine cannot do just now 503."""
    if isinstance(error, RefusedError):
        return HttpError(503, str(error), "steering")
    return HttpError(
        400, str(error).splitlines()[0] if str(error) else type(error).__name__, getattr(error, "parameter", None)
    )


async def _with_receipts(events: AsyncIterator[str], asked: _Request) -> AsyncIterator[str]:
    """The stream, with one more event before its end: an empty chunk that carries the receipts."""
    chunk: dict[str, Any] = {}
    async for event in events:
        if event.startswith(DONE):
            head = {k: chunk[k] for k in ("id", "object", "created", "model") if k in chunk}
            tail: dict[str, Any] = {"choices": [], "steering": [asdict(r) for r in asked.receipts]}
            if asked.failure is not None:
                tail = _http(asked.failure).content()
            yield f"data: {json.dumps(head | tail)}\n\n"
        elif not chunk and event.startswith("data: {"):
            chunk = json.loads(event[6:])
        yield event
