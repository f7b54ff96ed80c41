"""The page: two panes from one prompt and seed, and the promotion of what is steered."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from steer import pocket
from steer.engine import Engine
from steer.store.vectors import VectorStore
from ui.compare import compare_section
from ui.promote import promote_section

if TYPE_CHECKING:
    from steer.server.promotions import Promotions

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def create_ui(engine: Engine, promotions: Promotions, vectors: VectorStore) -> gr.Blocks:
    """The whole page for one engine and its folder of vectors."""
    with gr.Blocks(title="Steer", analytics_enabled=False, fill_width=True) as page:
        name = "pocket model" if Path(engine.model).resolve() == pocket.MODEL.resolve() else engine.model
        gr.HTML(f"<header><h1>Steer</h1><span>{html.escape(name)}</span></header>")
        controls = compare_section(page, engine, vectors)
        promote_section(page, engine, promotions, vectors, controls)
    return page
