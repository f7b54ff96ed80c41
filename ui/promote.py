"""Promote: distil what is steered into the weights, as a job outside the page, with live progress."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import gradio as gr

from steer.engine import Engine
from steer.errors import SteerError
from steer.pairs import Messages
from steer.store.vectors import VectorStore
from ui.compare import Controls

if TYPE_CHECKING:
    from steer.server.promotions import Promotions
    from steer.store import Job

STATES = {
    "queued": "waiting",
    "sampling": "the steered model answers the training prompts",
    "training": "training",
    "swapping": "swapping the weights",
    "proving": "asking the held-out prompts again, without the vector",
    "done": "done: the behaviour is in the weights and the vector is off",
    "failed": "failed",
    "cancelled": "cancelled; the served weights are as they were",
}


def lines(text: str | None) -> list[Messages]:
    """One user message for each line that is not blank."""
    return [[{"role": "user", "content": line.strip()}] for line in (text or "").splitlines() if line.strip()]


def job_html(job: Job | None) -> str:
    """State, progress bar and the rates of a job."""
    if job is None:
        return "No promotion yet."
    done, of = job.progress.get("done", 0), job.progress.get("of", 1) or 1
    share = 100 if job.state == "done" else 100 * done / of
    note = f" step {done} of {of}" if job.state == "training" else ""
    parts = [
        f'<div data-state="{job.state}"><b>{html.escape(job.config["name"])}</b> at strength {job.config["intervention"]["strength"]:g}: '
        f"{STATES[job.state]}{note} {html.escape(job.message)}</div>",
        f'<div class="progress"><div style="width:{share:.0f}%"></div></div>',
    ]
    labels = {"before": "before", "steered": "steered", "after": "now, without the vector"}
    rows = [
        f"<tr><td>{label}</td><td>{r['mean']:.0%}</td><td>[{r['low']:.0%}, {r['high']:.0%}]</td><td>n = {r['n']}</td></tr>"
        for key, label in labels.items()
        if (r := job.result.get(key))
    ]
    if rows:
        parts.append(
            f'<table class="arms"><tr><th>behaviour, held out</th><th></th><th>95 %</th><th></th></tr>{"".join(rows)}</table>'
        )
    if job.state == "done":
        version = job.result["weight_version"]
        parts.append(
            f"<div>weight version {version['before']} → {version['after']}; weights in {html.escape(job.result['weights'])}</div>"
        )
    return "".join(parts)


def promote_section(
    page: gr.Blocks, engine: Engine, promotions: Promotions, vectors: VectorStore, controls: Controls
) -> None:
    """Build the section."""
    with gr.Accordion("Promote into the weights", open=True):
        gr.Markdown(
            "Frozen-context training distils the steered model's answers into the weights while the server goes on serving. "
            "Then the weights are swapped in place and the vector is no longer needed."
        )
        with gr.Accordion("Training prompts and general texts", open=False):
            prompts = gr.Textbox(label="Prompts, one a line (empty: the pocket model's own)", lines=4)
            general = gr.Textbox(
                label="Texts that must not change, one a line (empty: the pocket model's own)", lines=4
            )
        with gr.Row():
            start = gr.Button("Promote", variant="primary", elem_id="promote")
            cancel = gr.Button("Cancel", elem_id="cancel")
        status = gr.HTML(elem_id="job")
        loss = gr.HTML(elem_id="loss", elem_classes="loss")
    timer = gr.Timer(1.0)
    drawn = gr.State("")  # what the loss picture shows, so that it is drawn anew only when there is news

    def latest() -> Job | None:
        found = [j for j in promotions.jobs.all() if j.kind == "promotion"]
        return found[0] if found else None

    def show(seen: str) -> tuple[Any, Any, str]:
        job = latest()
        if job is None:
            return job_html(None), "", ""
        reports = promotions.jobs.losses(job.id)
        now = f"{job.id}:{len(reports)}"
        if now == seen:
            return job_html(job), gr.skip(), seen
        from train.report import plot_loss

        return job_html(job), plot_loss(reports) if reports else "", now

    def begin(name: str, strength: float, layer: int, tokens: str, asked: str, kept: str) -> None:
        try:
            vectors.get(name)
            promotions.start(
                vectors.folder / f"{name}.safetensors",
                strength,
                None if layer < 0 else [layer],
                tokens,
                lines(asked),
                [m[0]["content"] for m in lines(kept)],
            )
        except SteerError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def stop() -> None:
        job = latest()
        if job is not None and job.active:
            promotions.cancel(job.id)

    chosen = [controls.vector, controls.strength, controls.layer, controls.tokens, prompts, general]
    start.click(begin, chosen, None).then(show, drawn, [status, loss, drawn], show_progress="hidden")
    cancel.click(stop, None, None)
    timer.tick(show, drawn, [status, loss, drawn], show_progress="hidden")
    page.load(show, drawn, [status, loss, drawn], show_progress="hidden")
