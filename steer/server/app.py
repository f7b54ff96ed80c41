"""The HTTP application: OpenAI's protocol, vectors, health, metrics and jobs. The page is mounted on it by `ui.serve`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from steer import __version__
from steer.engine import Engine
from steer.errors import SteerError
from steer.server.metrics import exposition
from steer.server.openai import on_loop, openai_routes
from steer.server.promotions import Promotions
from steer.store import Job
from steer.store.vectors import VectorStore
from steer.vector import SteeringVector

LARGEST_VECTOR = 256 * 2**20  # bytes of an uploaded file


def create_app(engine: Engine, promotions: Promotions, vectors: VectorStore) -> FastAPI:
    """The application for one engine."""
    app = FastAPI(title="Steer", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(openai_routes(engine, vectors, engine.model))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        try:
            await on_loop(engine.check_health(), engine.loop)
        except Exception as error:
            raise HTTPException(503, f"the engine does not answer: {type(error).__name__}") from None
        return {"status": "ok", "model": engine.model, "weight_version": engine.weight_version, "layers": engine.layers}

    @app.get("/metrics")
    async def metrics() -> Response:
        text, kind = exposition(engine)
        return Response(text, media_type=kind)

    @app.get("/v1/steering/vectors")
    def list_vectors() -> list[dict[str, Any]]:
        return [_listed(name, vectors) for name in vectors.names()]

    @app.put("/v1/steering/vectors/{name}")
    async def put_vector(name: str, request: Request) -> dict[str, Any]:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > LARGEST_VECTOR:
                raise HTTPException(413, f"a vector file has at most {LARGEST_VECTOR} bytes")
        return _described(name, vectors.put(name, bytes(content), model=engine))

    @app.delete("/v1/steering/vectors/{name}")
    def delete_vector(name: str) -> dict[str, str]:
        try:
            vectors.remove(name)
        except SteerError as error:
            raise HTTPException(404, str(error)) from None
        return {"deleted": name}

    @app.get("/jobs")
    def jobs() -> list[dict[str, Any]]:
        return [_public(j) for j in promotions.jobs.all()]

    @app.get("/jobs/{job}")
    def job(job: str) -> dict[str, Any]:
        try:
            return _public(promotions.jobs.get(job)) | {"losses": promotions.jobs.losses(job)}
        except SteerError as error:
            raise HTTPException(404, str(error)) from None

    @app.exception_handler(SteerError)
    async def refuse(_request: Request, error: SteerError) -> JSONResponse:
        return JSONResponse({"detail": str(error), "param": getattr(error, "field", "") or None}, 400)

    return app


def _listed(name: str, vectors: VectorStore) -> dict[str, Any]:
    """The description of a vector, or what is wrong with its file."""
    try:
        return _described(name, vectors.get(name))
    except SteerError as error:
        return {"name": name, "error": str(error)}


def _described(name: str, vector: SteeringVector) -> dict[str, Any]:
    """What a client needs to know of a vector to use it."""
    return {
        "name": name,
        "hash": vector.hash,
        "poles": {"positive": vector.poles[0], "negative": vector.poles[1]},
        "layers": vector.layers,
        "selected": list(vector.selected),
        "strength": vector.strength,
        "tokens": vector.tokens,
        "method": vector.method,
        "read": vector.read,
        "scores": {str(k): asdict(v) for k, v in vector.scores.items()},
    }


def _public(job: Job) -> dict[str, Any]:
    config = {k: v for k, v in job.config.items() if k not in ("prompts", "general")}
    shown = ("id", "kind", "state", "progress", "result", "message", "created", "updated")
    return {name: getattr(job, name) for name in shown} | {"config": config}
