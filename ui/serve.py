"""`steer serve`: FastAPI and the Gradio page in one process, on loopback unless asked otherwise."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from steer import pocket
from steer.engine import Engine
from steer.errors import SteerError


def serve_engine(engine: Engine, data: Path, host: str, port: int) -> None:
    """Serve until interrupted.

    Args:
        engine: the served model.
        data: folder of vectors (`vectors/*.safetensors`) and jobs; made if missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import uvicorn

    from steer.server.app import create_app
    from steer.server.promotions import Promotions
    from steer.store.vectors import VectorStore

    folder = data / "vectors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteerError(f"{data}: cannot be used as the data folder: {error.strerror}") from None
    if Path(engine.model).resolve() == pocket.MODEL.resolve():
        for shipped in sorted(pocket.VECTORS.glob("*.safetensors")):
            if not (folder / shipped.name).exists():
                shutil.copyfile(shipped, folder / shipped.name)
    vectors = VectorStore(folder)
    promotions = Promotions(engine, data)
    app = create_app(engine, promotions, vectors)
    mount(app, engine, promotions, vectors)
    shown = "localhost" if host in ("127.0.0.1", "::1") else host
    import sys

    sys.stdout.write(f"Steer is serving {engine.model} on http://{shown}:{port} (Ctrl-C stops it)\n")
    sys.stdout.flush()
    try:
        uvicorn.run(app, host=host, port=port, log_level="warning")
    finally:
        promotions.close()


def mount(app, engine: Engine, promotions, vectors) -> None:
    """Put the page on the application at /."""
    import gradio as gr

    from ui.app import CSS, create_ui

    blocks = create_ui(engine, promotions, vectors)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        css=CSS,
        theme=gr.themes.Soft(
            primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        show_error=True,
        enable_monitoring=False,
    )
