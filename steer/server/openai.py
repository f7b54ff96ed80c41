"""The routes of OpenAI's protocol. Requests are handled on the engine's loop, answers are sent from the server's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from steer.engine import Engine
from steer.engine.openai import HttpError, OpenAIServing
from steer.store.vectors import VectorStore

T = TypeVar("T")


async def on_loop(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """Await a coroutine that runs on another loop; a cancellation here cancels it there."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


async def _stream(events: AsyncIterator[str], loop: asyncio.AbstractEventLoop) -> AsyncIterator[str]:
    """The events of a stream on another loop. It is read by one task there, and dropped when nobody listens here."""
    here, queue = asyncio.get_running_loop(), asyncio.Queue()

    async def pump() -> None:
        try:
            async for event in events:
                here.call_soon_threadsafe(queue.put_nowait, event)
        finally:
            with contextlib.suppress(RuntimeError):  # the server is gone
                here.call_soon_threadsafe(queue.put_nowait, None)

    task = asyncio.run_coroutine_threadsafe(pump(), loop)
    try:
        while (event := await queue.get()) is not None:
            yield event
    finally:
        task.cancel()


async def _unless_left(request: Request, work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T | None:
    """The result of work on the engine's loop, or None if the client left first, and the work is stopped then."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(on_loop(work, loop)), asyncio.ensure_future(left())
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


def openai_routes(engine: Engine, vectors: VectorStore, name: str) -> APIRouter:
    """`/v1/models`, `/v1/completions` and `/v1/chat/completions`."""
    router = APIRouter(prefix="/v1")

    async def make() -> OpenAIServing:
        return OpenAIServing(engine.client, name, vectors.resolve)

    serving = asyncio.run_coroutine_threadsafe(make(), engine.loop).result()

    async def answer(request: Request, handler: Any) -> Response:
        try:
            try:
                body = await request.json()
            except (ValueError, RecursionError):
                raise HttpError(400, "the body is not JSON") from None
            found = await _unless_left(request, handler(body), engine.loop)
        except HttpError as error:
            return JSONResponse(error.content(), error.status)
        if found is None:
            return Response(status_code=499)
        if isinstance(found, dict):
            return JSONResponse(found)
        return StreamingResponse(_stream(found, engine.loop), media_type="text/event-stream")

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return await on_loop(serving.models(), engine.loop)

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, serving.completions)

    @router.post("/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, serving.chat)

    return router
