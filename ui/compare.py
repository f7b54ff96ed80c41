"""Side by side: plain on the left, steered on the right, streaming at the same time from the same prompt and seed."""

from __future__ import annotations

import html
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from steer.engine import Completion, Engine
from steer.errors import SteerError
from steer.intervention import OPS, Intervention, parse
from steer.scope import SCOPES
from steer.store.vectors import VectorStore
from steer.vector import SteeringVector

EXAMPLES = [
    "Let us paint the fence in red.",
    "Can you cook the soup with garlic?",
    "We should visit the lake by train.",
    "Please play the waltz on piano.",
]
LIMIT = 3.0


@dataclass
class Controls:
    """What the promote section reads from here."""

    vector: gr.Dropdown
    strength: gr.Slider
    layer: gr.Dropdown
    tokens: gr.Radio


def poles_html(vector: SteeringVector | None) -> str:
    """Both poles, at the ends of the slider."""
    minus, plus = (vector.poles[1], vector.poles[0]) if vector else ("negative", "positive")
    return (
        f'<div class="poles"><span class="minus">← {html.escape(minus)}</span>'
        f'<span class="plus">{html.escape(plus)} →</span></div>'
    )


def receipt_html(answer: Completion | None) -> str:
    """One line: what was done to this answer."""
    if answer is None:
        return ""
    r = answer.receipt
    done = f"{len(answer.token_ids)} tokens · weight version {r.weight_version}"
    if r.interventions and answer.finish_reason:
        layers = ", ".join(str(n) for i in r.interventions for n in i["layers"])
        done += f" · {r.tokens_steered} tokens steered at layer {layers} · {r.intervention_hash[:10]}"
    return html.escape(done + (" · weights changed meanwhile" if r.weights_changed else ""))


def both(
    engine: Engine, prompt: str, interventions: list[Intervention], **sampling: Any
) -> Iterator[tuple[Completion | None, Completion | None]]:
    """(plain, steered) so far; each side moves as soon as it has news."""
    news: queue.SimpleQueue[tuple[int, Completion | BaseException | None]] = queue.SimpleQueue()

    def pump(side: int, steering: list[Intervention]) -> None:
        try:
            for piece in engine.stream(prompt, steering, **sampling):
                news.put((side, piece))
            news.put((side, None))
        except BaseException as error:
            news.put((side, error))

    for side, steering in enumerate(([], interventions)):
        threading.Thread(target=pump, args=(side, steering), daemon=True).start()
    latest: list[Completion | None] = [None, None]
    running = 2
    while running:
        side, item = news.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            running -= 1
        else:
            latest[side] = item
            yield latest[0], latest[1]


def compare_section(page: gr.Blocks, engine: Engine, vectors: VectorStore) -> Controls:
    """Build the section; returns the controls the promotion reads."""
    names = vectors.names()
    first = vectors.get(names[0]) if names else None
    with gr.Row(equal_height=False):
        with gr.Column(scale=3):
            prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=2, elem_id="prompt")
            gr.Examples(EXAMPLES, prompt, label="Try")
        with gr.Column(scale=3):
            vector = gr.Dropdown(names, value=names[0] if names else None, label="Vector", elem_id="vector")
            strength = gr.Slider(
                -LIMIT,
                LIMIT,
                value=first.strength if first else 1.0,
                step=0.05,
                label="Strength (separations)",
                elem_id="strength",
            )
            poles = gr.HTML(poles_html(first), elem_id="poles")
    with gr.Row():
        left = gr.Textbox(label="Plain", lines=5, interactive=False, elem_id="plain", elem_classes="pane")
        right = gr.Textbox(label="Steered", lines=5, interactive=False, elem_id="steered", elem_classes="pane")
    with gr.Row():
        left_receipt = gr.HTML(elem_classes="receipt", elem_id="plain-receipt")
        right_receipt = gr.HTML(elem_classes="receipt", elem_id="steered-receipt")
    with gr.Row():
        go = gr.Button("Generate both", variant="primary", elem_id="generate")
        stop = gr.Button("Stop", elem_id="stop")
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            layer = gr.Dropdown(
                [("the vector's own", -1), *[(f"layer {n}", n) for n in range(engine.layers)]], value=-1, label="Layer"
            )
            op = gr.Radio(list(OPS), value="add", label="Operation", elem_id="op")
            tokens = gr.Radio(list(SCOPES), value=first.tokens if first else "all", label="Tokens steered")
        with gr.Row():
            seed = gr.Number(7, label="Seed", precision=0)
            temperature = gr.Slider(0.0, 1.5, value=1.0, step=0.05, label="Temperature")
            length = gr.Slider(8, 512, value=64, step=8, label="Most tokens")
        spec = gr.Textbox(
            label="Instead of all that: interventions as JSON, as a request over HTTP carries them",
            placeholder='[{"vector": "accept", "strength": 0.7}, {"vector": "warm", "op": "ablate", "tokens": [-4, null]}]',
            elem_id="spec",
        )

    def generate(
        text: str,
        name: str,
        amount: float,
        at: int,
        what: str,
        scope: str,
        number: float,
        heat: float,
        most: float,
        raw: str | None,
    ) -> Iterator[tuple[str, str, str, str]]:
        if not text.strip():
            raise gr.Error("Write a prompt first.", print_exception=False)
        try:
            if raw and raw.strip():  # None while its accordion was never open
                chosen = parse(raw, vectors.resolve)
            else:
                chosen = [Intervention(vectors.get(name), amount, what, None if at < 0 else (at,), scope)]
            sampling = {"seed": int(number), "temperature": heat, "max_tokens": int(most)}
            for plain, moved in both(engine, text, chosen, **sampling):
                yield (
                    plain.text.lstrip() if plain else "", moved.text.lstrip() if moved else "", receipt_html(plain), receipt_html(moved)
                )  # fmt: skip
        except SteerError as error:
            field = getattr(error, "field", "")
            said = f"{field}: {error}" if field.startswith("steering[") else str(error)
            raise gr.Error(said, print_exception=False) from None

    inputs = [prompt, vector, strength, layer, op, tokens, seed, temperature, length, spec]
    outputs = [left, right, left_receipt, right_receipt]
    for trigger in (go.click, prompt.submit):
        running = trigger(generate, inputs, outputs, concurrency_limit=16, show_progress="hidden")
        stop.click(None, cancels=[running])

    def point(name: str | None) -> tuple[str, Any, Any]:
        """Poles, and the operating point the vector was found to work at."""
        if not name:
            return poles_html(None), gr.skip(), gr.skip()
        try:
            chosen = vectors.get(name)
        except SteerError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return poles_html(chosen), chosen.strength, chosen.tokens

    def refresh(current: str | None) -> Any:
        found = vectors.names()
        return gr.Dropdown(choices=found, value=current if current in found else (found[0] if found else None))

    page.load(refresh, vector, vector)
    vector.change(point, vector, [poles, strength, tokens])
    return Controls(vector, strength, layer, tokens)
