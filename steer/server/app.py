"""The HTTP application: health and jobs. The page is mounted on it by `ui.serve`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException

from steer import __version__
from steer.engine import Engine
from steer.errors import SteerError
from steer.server.promotions import Promotions
from steer.store import Job


def create_app(engine: Engine, promotions: Promotions) -> FastAPI:
    """The application for one engine."""
    app = FastAPI(title="Steer", version=__version__, docs_url=None, redoc_url=None)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "model": engine.model, "weight_version": engine.weight_version, "layers": engine.layers}

    @app.get("/jobs")
    def jobs() -> list[dict[str, Any]]:
        return [_public(j) for j in promotions.jobs.all()]

    @app.get("/jobs/{job}")
    def job(job: str) -> dict[str, Any]:
        try:
            return _public(promotions.jobs.get(job)) | {"losses": promotions.jobs.losses(job)}
        except SteerError as error:
            raise HTTPException(404, str(error)) from None

    return app


def _public(job: Job) -> dict[str, Any]:
    config = {k: v for k, v in job.config.items() if k not in ("prompts", "general")}
    shown = ("id", "kind", "state", "progress", "result", "message", "created", "updated")
    return {name: getattr(job, name) for name in shown} | {"config": config}
